"""Factored state on meshes: where it lies and what its updates communicate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memjax import optimizers, sharding, transforms
from tests import hlo

# Square kernels, as rows and columns of equal size must not be confused.
PARAMS = jax.tree.map(
  lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
  {'q': {'kernel': (4, 64, 64)}, 'norm': {'scale': (4, 64)}, 'embed': {'embedding': (96, 64)}},
  is_leaf=lambda x: isinstance(x, tuple),
)
RULES = (
  ('embedding', PartitionSpec('tensor', 'fsdp')),
  ('kernel', PartitionSpec(None, 'fsdp', 'tensor')),
  ('scale', PartitionSpec()),
)
ARGUMENTS = {'adafactor': {}, 'came': {}, 'sm3': {}, 'adam_mini': {'head_dim': 16}, 'muon': {}}


def _update(name):
  """The optimizer's state and its shardings on 4 x 2 devices, and the compiled update."""
  optimizer = optimizers.OPTIMIZERS[name](0.1, weight_decay=0.1, **ARGUMENTS[name])
  params = sharding.param_shardings(PARAMS, RULES, sharding.make_mesh(1, 4, 2))
  state = jax.eval_shape(optimizer.init, PARAMS)
  states = sharding.state_shardings(state, PARAMS, params)
  update = jax.jit(
    optimizer.update, in_shardings=(params, states, params), out_shardings=(params, states)
  )
  return state, states, update.lower(PARAMS, state, PARAMS).compile()


@pytest.mark.parametrize('name', ARGUMENTS)
def test_updates_communicate_rows_and_columns_only(name):
  _, _, compiled = _update(name)
  found = hlo.collectives(compiled.as_text())
  assert found
  if name == 'muon':  # Newton-Schulz multiplies whole matrices, though never a stack of them.
    assert max(map(hlo.elements, found)) == 64 * 64
  else:
    assert {c.kind for c in found} == {'all-reduce'}
    assert max(map(hlo.elements, found)) <= 4 * 64  # One row or column of every layer.


def test_factors_lie_where_their_parameters_lie():
  optimizer = transforms.scale_by_adafactor(min_dim_size_to_factor=32)
  params = sharding.param_shardings(PARAMS, RULES, sharding.make_mesh(1, 4, 2))
  state = jax.eval_shape(optimizer.init, PARAMS)
  factors = sharding.state_shardings(state, PARAMS, params).factors
  assert factors.v_row['q']['kernel'].spec == PartitionSpec(None, 'fsdp', None)
  assert factors.v_col['q']['kernel'].spec == PartitionSpec(None, None, 'tensor')
  assert factors.v_row['embed']['embedding'].spec == PartitionSpec('tensor', None)
  assert factors.v_col['embed']['embedding'].spec == PartitionSpec(None, 'fsdp')
  assert factors.v['norm']['scale'].spec == PartitionSpec(None, None)


@pytest.mark.parametrize(
  'make',
  [
    transforms.scale_by_adalomo,
    transforms.scale_by_came,
    transforms.scale_by_sm3,
    lambda: transforms.scale_by_adam_mini(head_dim=4),
    transforms.scale_by_muon,
  ],
  ids=['adalomo', 'came', 'sm3', 'adam_mini', 'muon'],
)
def test_explicit_axes_give_the_same_updates_and_keep_their_shardings(make):
  transform = make()
  rng = np.random.default_rng(0)
  params, gradient = (
    {'q': jnp.asarray(rng.standard_normal((3, 8, 16)), jnp.float32)} for _ in range(2)
  )
  plain = jax.jit(transform.update)
  expected, _ = plain(gradient, transform.init(params), params)
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Explicit,) * 2)
  where = NamedSharding(mesh, PartitionSpec(None, 'fsdp', 'tensor'))
  with jax.set_mesh(mesh):
    params, gradient = jax.device_put((params, gradient), where)
    state = jax.jit(transform.init)(params)
    updates, after = jax.jit(transform.update)(gradient, state, params)
  assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
  assert updates['q'].sharding.spec == where.spec
  # Sums in another order; five rounds of Newton-Schulz amplify them by 3.4 a round.
  np.testing.assert_allclose(updates['q'], expected['q'], rtol=1e-3, atol=1e-4)
