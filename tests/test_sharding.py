"""Meshes, rules, and the shardings derived for optimizer state."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from memjax import sharding
from memjax.naming import path_string

SHAPE = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
PARAMS = {
  'blocks': {'attn': {'q': {'kernel': SHAPE(3, 16, 8)}}, 'norm': {'scale': SHAPE(3, 16)}},
  'embed': {'embedding': SHAPE(64, 16)},
}
RULES = (
  ('embed/embedding', P('tensor', 'fsdp')),
  ('q/kernel', P(None, 'fsdp', 'tensor')),
  ('scale', P()),
)


def specs(tree):
  return {path_string(path): tuple(x.spec) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_minus_one_takes_the_devices_that_are_left():
  assert dict(sharding.make_mesh(-1, 2, 2).shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}
  assert dict(sharding.make_mesh(1, -1, 1).shape) == {'data': 1, 'fsdp': 8, 'tensor': 1}


@pytest.mark.parametrize('sizes', [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (4, 4, 1)])
def test_a_mesh_that_is_not_the_devices_is_refused(sizes):
  with pytest.raises(ValueError, match='mesh'):
    sharding.make_mesh(*sizes)


def test_the_first_matching_rule_wins_and_every_leaf_needs_one():
  mesh = sharding.make_mesh(2, 2, 2)
  assert specs(sharding.param_shardings(PARAMS, RULES, mesh)) == {
    'blocks/attn/q/kernel': (None, 'fsdp', 'tensor'),
    'blocks/norm/scale': (),
    'embed/embedding': ('tensor', 'fsdp'),
  }
  first = (('kernel', P()), *RULES)
  assert specs(sharding.param_shardings(PARAMS, first, mesh))['blocks/attn/q/kernel'] == ()
  with pytest.raises(ValueError, match=r'blocks/norm/scale.*no sharding rule'):
    sharding.param_shardings(PARAMS, RULES[:2], mesh)


def test_a_dimension_that_does_not_divide_names_leaf_axis_and_mesh():
  params = {'q': {'kernel': SHAPE(3, 12, 8)}}
  with pytest.raises(ValueError, match=r"q/kernel: axis 1 of shape \(3, 12, 8\).*'fsdp' = 8"):
    sharding.param_shardings(params, RULES, sharding.make_mesh(1, 8, 1))


def test_moments_take_their_parameters_sharding_and_counts_are_replicated():
  mesh = sharding.make_mesh(2, 2, 2)
  params = sharding.param_shardings(PARAMS, RULES, mesh)
  state = jax.eval_shape(optax.adamw(1e-3).init, PARAMS)
  found = specs(sharding.state_shardings(state, PARAMS, params))
  for moment in ('mu', 'nu'):
    assert found[f'0/{moment}/blocks/attn/q/kernel'] == (None, 'fsdp', 'tensor')
    assert found[f'0/{moment}/embed/embedding'] == ('tensor', 'fsdp')
  assert found['0/count'] == ()


def test_projected_leaves_are_sharded_where_they_divide():
  mesh = sharding.make_mesh(2, 2, 2)
  params = sharding.param_shardings(PARAMS, RULES, mesh)
  state = {
    'left': {'blocks': {'attn': {'q': {'kernel': SHAPE(3, 16, 4)}}}},  # [L, m, r]
    'mu': {'blocks': {'attn': {'q': {'kernel': SHAPE(3, 4, 8)}}}},  # [L, r, n]
    'odd': {'blocks': {'attn': {'q': {'kernel': SHAPE(3, 3, 8)}}}},  # r does not divide.
  }
  assert specs(sharding.state_shardings(state, PARAMS, params)) == {
    'left/blocks/attn/q/kernel': (None, 'fsdp', 'tensor'),
    'mu/blocks/attn/q/kernel': (None, 'fsdp', 'tensor'),
    'odd/blocks/attn/q/kernel': (None, None, 'tensor'),
  }


def test_factored_leaves_keep_the_axes_of_the_dimensions_they_kept():
  mesh = sharding.make_mesh(2, 2, 2)
  params = sharding.param_shardings(PARAMS, RULES, mesh)
  path = lambda leaf: {'blocks': {'attn': {'q': {'kernel': leaf}}}}
  state = {'v_row': path(SHAPE(3, 16)), 'v_col': path(SHAPE(3, 8)), 'v': path(SHAPE(1))}
  found = specs(sharding.state_shardings(state, PARAMS, params))
  assert found['v_row/blocks/attn/q/kernel'] == (None, 'fsdp')
  assert found['v_col/blocks/attn/q/kernel'] == (None, 'tensor')
  assert found['v/blocks/attn/q/kernel'] == (None,)


def test_state_of_a_single_array_is_derived_too():
  mesh = sharding.make_mesh(1, 8, 1)
  leaf = SHAPE(16, 8)
  where = sharding.param_shardings(leaf, (('', P('fsdp')),), mesh)
  state = jax.eval_shape(optax.scale_by_adam().init, leaf)
  found = sharding.state_shardings(state, leaf, where)
  assert found.mu.spec == P('fsdp', None)
  assert found.count.spec == P()


def test_bytes_per_device_are_those_of_the_live_shards():
  mesh = sharding.make_mesh(2, 2, 2)
  shardings = sharding.param_shardings(PARAMS, RULES, mesh)
  arrays = jax.jit(
    lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), PARAMS), out_shardings=shardings
  )()
  live = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))
  assert sharding.bytes_per_device(PARAMS, shardings) == live == 4 * (3 * 16 * 8 // 4 + 48 + 256)


def test_a_batch_that_does_not_divide_says_what_would():
  mesh = sharding.make_mesh(2, 2, 2)
  sharding.check_batch(8, 2, mesh)
  with pytest.raises(ValueError, match='multiple of 8'):
    sharding.check_batch(6, 2, mesh)
