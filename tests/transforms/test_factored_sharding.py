"""State on meshes: where it lies, and what the updates of every optimizer communicate."""

import inspect

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
FACTORED = ('adafactor', 'adalomo', 'came', 'sm3', 'adam_mini')
ELEMENTWISE = ('adamw', 'adamw8bit', 'adam4bit', 'lion', 'lion8bit', 'sgd', 'vector_adam')
ARGUMENTS = {'head_dim': 16, 'rank': 8, 'random_after': 10, 'weight_decay': 0.1, 'block_size': 16}
# One of each kind is quick.
QUICK = ('adafactor', 'came', 'sm3', 'adam_mini', 'muon', 'adam4bit', 'apollo_mini')


def _update(name):
  """The optimizer's state and its shardings on 4 x 2 devices, and the compiled update."""
  params = sharding.param_shardings(PARAMS, RULES, sharding.make_mesh(1, 4, 2))
  arguments = {**ARGUMENTS, 'layout': sharding.layout(PARAMS, params)}
  known = inspect.signature(optimizers.OPTIMIZERS[name]).parameters
  optimizer = optimizers.OPTIMIZERS[name](0.1, **{k: arguments[k] for k in arguments if k in known})
  state = jax.eval_shape(optimizer.init, PARAMS)
  states = sharding.state_shardings(state, PARAMS, params)
  update = jax.jit(
    optimizer.update, in_shardings=(params, states, params), out_shardings=(params, states)
  )
  return state, states, update.lower(PARAMS, state, PARAMS).compile()


@pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in optimizers.OPTIMIZERS],
)
def test_updates_communicate_no_whole_matrix(name):
  _, _, compiled = _update(name)
  found = hlo.collectives(compiled.as_text())
  sizes = [hlo.elements(c) for c in found]
  if name == 'muon':  # Newton-Schulz multiplies whole matrices, though never a stack of them.
    assert max(sizes) == 64 * 64
  elif name in FACTORED:
    assert {c.kind for c in found} == {'all-reduce'}
    assert max(sizes) <= 4 * 64  # One row or column of every layer.
  elif name in ELEMENTWISE:
    assert not found
  else:
    assert 0 < max(sizes) <= 4 * 8 * 64  # The projections of every layer.


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
  off = np.linalg.norm(updates['q'] - expected['q']) / np.linalg.norm(expected['q'])
  assert off < (1e-4 if make is transforms.scale_by_muon else 1e-5)
