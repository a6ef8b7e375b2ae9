"""Stochastic rounding: its mean, its neighbours, its address."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memjax import transforms
from memjax.naming import fold_in_path
from memjax.transforms.rounding import round_stochastically


@pytest.mark.parametrize('update', [1e-4, 1e-3, -3e-3])
def test_mean_update_survives_where_nearest_loses_it(update):
  params = {'w': jnp.full((64, 1024), 1.5, jnp.bfloat16)}
  updates = {'w': jnp.full((64, 1024), update)}
  nearest = transforms.apply_updates(params, updates)['w']
  np.testing.assert_array_equal(nearest, params['w'])
  rounded = transforms.apply_updates(params, updates, key=jax.random.key(0))['w']
  moved = np.asarray(rounded, np.float64) - 1.5
  # Each entry moves by an ulp with probability p = |update| / ulp; z is standard normal.
  ulp = 2.0**-7
  p = abs(update) / ulp
  z = (moved.mean() - update) / (ulp * np.sqrt(p * (1 - p) / moved.size))
  assert abs(z) < 4
  assert set(np.unique(np.abs(moved))) == {0.0, ulp}


def test_numbers_that_bf16_holds_and_those_beyond_stay():
  exact = jnp.asarray([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan, 3.0e38])
  exact = exact.at[-1].set(jnp.finfo(jnp.bfloat16).max.astype(jnp.float32))
  for seed in range(8):
    rounded = round_stochastically(exact, jax.random.key(seed))
    np.testing.assert_array_equal(rounded.astype(jnp.float32), exact)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float16])
def test_other_dtypes_are_added_as_optax_does(dtype):
  params = {'w': jax.random.normal(jax.random.key(0), (8, 8), dtype), 'none': None}
  updates = {'w': jax.random.normal(jax.random.key(1), (8, 8)), 'none': None}
  expected = optax.apply_updates(params, updates)
  for key in (None, jax.random.key(2)):
    moved = transforms.apply_updates(params, updates, key=key)
    assert moved['w'].dtype == dtype
    np.testing.assert_array_equal(moved['w'], expected['w'])


def test_a_layer_alone_draws_the_bits_it_draws_in_the_stack():
  params = {'blocks': {'kernel': jnp.ones((3, 4, 64), jnp.bfloat16)}}
  updates = {'blocks': {'kernel': jnp.full((3, 4, 64), 1e-3)}}
  key = jax.random.key(0)
  whole = transforms.apply_updates(params, updates, key=key)['blocks']['kernel']
  for layer in range(3):
    layer_key = jax.random.fold_in(fold_in_path(key, 'blocks/kernel'), layer)
    alone = round_stochastically(jnp.full((4, 64), 1.001), layer_key)
    np.testing.assert_array_equal(alone, whole[layer])
  assert np.any(whole[0] != whole[1])


def test_leaves_draw_bits_of_their_own_that_no_mesh_changes():
  params = {name: jnp.ones((8, 64), jnp.bfloat16) for name in 'ab'}
  updates = {name: jnp.full((8, 64), 1e-3) for name in 'ab'}
  add = jax.jit(transforms.apply_updates)
  expected = add(params, updates, key=jax.random.key(0))
  assert np.any(expected['a'] != expected['b'])
  for types in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(types,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec('fsdp', 'tensor'))
    with jax.set_mesh(mesh):
      sharded = add(*jax.device_put((params, updates), sharding), key=jax.random.key(0))
    assert sharded['a'].sharding.spec == sharding.spec
    jax.tree.map(np.testing.assert_array_equal, expected, sharded)
