"""What every transform must keep; a new transform joins by a line in `TRANSFORMS`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from memjax import sharding, transforms
from memjax.transforms.float32 import in_float32

RANK, EVERY = 4, 3


class Entry(NamedTuple):
  make: Callable[[], optax.GradientTransformation]
  # (m, n) -> 4-byte numbers of state a matrix, as the docstring says.
  state: Callable[[int, int], int]
  projects: bool = True


def _low_rank(inner, **options):
  return lambda: transforms.project(inner(), RANK, refresh_every=EVERY, **options)


def _galore(**options):
  return lambda: transforms.scale_by_galore(RANK, refresh_every=EVERY, **options)


def _low_bit_adam(bits):
  return transforms.quantize_state(optax.scale_by_adam(), bits, min_size=1)


_galore_state = lambda m, n: RANK * (min(m, n) + 2 * max(m, n))

TRANSFORMS = {
  'adam': Entry(lambda: in_float32(optax.scale_by_adam()), lambda m, n: 2 * m * n, projects=False),
  'galore': Entry(_galore(), _galore_state),
  'galore_svd': Entry(_galore(basis=transforms.svd(), stagger=False), _galore_state),
  'galore_rotate': Entry(_galore(moments='rotate'), _galore_state),
  # The sides take the exact SVD, which compiles in half the time.
  'galore_long': Entry(
    _galore(side='long', basis=transforms.svd()),
    lambda m, n: RANK * (max(m, n) + 2 * min(m, n)),
  ),
  'galore_left': Entry(
    _galore(side='left', basis=transforms.svd()), lambda m, n: RANK * (m + 2 * n)
  ),
  'galore_right': Entry(
    _galore(side='right', basis=transforms.svd()), lambda m, n: RANK * (n + 2 * m)
  ),
  # A gradient between its own singular vectors is diagonal: off the diagonal Adam divides one
  # rounding error by another, unless eps is larger than both.
  'galore_both': Entry(
    _galore(side='both', basis=transforms.svd(), eps=1e-3), lambda m, n: RANK * (m + n + 2 * RANK)
  ),
  'low_rank_momentum': Entry(
    _low_rank(lambda: optax.trace(0.9), moments='rotate'), lambda m, n: RANK * (m + n)
  ),
  'low_rank_lion': Entry(_low_rank(optax.scale_by_lion), lambda m, n: RANK * (m + n)),
  'galore_adafactor': Entry(
    lambda: transforms.scale_by_galore_adafactor(RANK, refresh_every=EVERY),
    lambda m, n: RANK * min(m, n) + RANK + max(m, n),
  ),
  'vector_adam': Entry(
    lambda: in_float32(transforms.scale_by_vector_adam()), lambda m, n: 2 * m * n, projects=False
  ),
  'adafactor': Entry(
    lambda: transforms.scale_by_adafactor(min_dim_size_to_factor=12),
    lambda m, n: m + n,
    projects=False,
  ),
  'adalomo': Entry(transforms.scale_by_adalomo, lambda m, n: m + n, projects=False),
  'came': Entry(transforms.scale_by_came, lambda m, n: m * n + 2 * (m + n), projects=False),
  'sm3': Entry(transforms.scale_by_sm3, lambda m, n: m + n, projects=False),
  'adam_mini': Entry(transforms.scale_by_adam_mini, lambda m, n: m * n + n, projects=False),
  'lion': Entry(lambda: in_float32(optax.scale_by_lion()), lambda m, n: m * n, projects=False),
  'muon': Entry(transforms.scale_by_muon, lambda m, n: m * n, projects=False),
  'apollo': Entry(
    lambda: transforms.scale_by_apollo(RANK, refresh_every=EVERY),
    lambda m, n: 2 * RANK * max(m, n) + 1,
    projects=False,
  ),
  'apollo_mini': Entry(
    lambda: transforms.scale_by_apollo_mini(refresh_every=EVERY),
    lambda m, n: 2 * max(m, n) + 1,
    projects=False,
  ),
  'fira': Entry(
    lambda: transforms.scale_by_fira(RANK, refresh_every=EVERY, basis=transforms.svd()),
    lambda m, n: _galore_state(m, n) + 1,
    projects=False,
  ),
  'golore': Entry(
    lambda: transforms.scale_by_golore(RANK, 2, refresh_every=EVERY, basis=transforms.svd()),
    _galore_state,
  ),
  'q_galore': Entry(
    lambda: transforms.scale_by_q_galore(RANK, refresh_every=EVERY, basis=transforms.svd()),
    lambda m, n: min(m, n) * (RANK / 2 + 4) / 4 + 7 + 2 * RANK * max(m, n),
  ),
  'q_galore_8bit': Entry(
    lambda: transforms.scale_by_q_galore(
      RANK, refresh_every=EVERY, basis=transforms.svd(), storage=transforms.packed(bits=8)
    ),
    lambda m, n: min(m, n) * (RANK + 4) / 4 + 7 + 2 * RANK * max(m, n),
  ),
  # Of each moment the codes, and a scale for every block, here the longer side.
  'adam_8bit': Entry(
    lambda: _low_bit_adam(8), lambda m, n: 2 * (m * n / 4 + min(m, n)), projects=False
  ),
  'adam_4bit': Entry(
    lambda: _low_bit_adam(4), lambda m, n: 2 * (m * n / 8 + min(m, n)), projects=False
  ),
  'galore_8bit': Entry(
    _low_rank(lambda: _low_bit_adam(8), basis=transforms.svd()),
    lambda m, n: RANK * (min(m, n) + 2 * (max(m, n) / 4 + 1)),
  ),
  'low_rank_random': Entry(
    _low_rank(optax.scale_by_adam, basis=transforms.random_projection()),
    lambda m, n: 2 * RANK * max(m, n),
  ),
  'limit_norm_growth': Entry(transforms.limit_norm_growth, lambda m, n: 1, projects=False),
}

SHAPES = {'matrix': {'w': (12, 20)}, 'stacked': {'w': (3, 12, 20), 'v': (3, 20, 12)}}
PARAMS = {'w': jnp.ones((3, 16, 32))}


def _gradient(step):
  """Matrices with a decaying spectrum, as gradients have; another one every step."""
  rng = np.random.default_rng(step)
  left = rng.standard_normal((3, 16, 16)) * 0.7 ** np.arange(16)
  return {'w': jnp.asarray(left @ rng.standard_normal((3, 16, 32)), jnp.float32)}


@functools.cache
def _compiled(name):
  """One jitted update a transform, shared by the tests; counts its traces."""
  transform, traces = TRANSFORMS[name].make(), []

  def update(gradient, state):
    traces.append(name)
    return transform.update(gradient, state, PARAMS)

  return transform, jax.jit(update), traces


def _run(name, steps, state=None):
  transform, update, _ = _compiled(name)
  state = transform.init(PARAMS) if state is None else state
  for step in steps:
    updates, state = update(_gradient(step), state)
  return updates, state


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['f32', 'bf16'])
@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.parametrize('name', TRANSFORMS)
def test_update_keeps_shape_dtype_and_state_structure(name, kind, dtype):
  transform = TRANSFORMS[name].make()
  params = {key: jnp.zeros(shape, dtype) for key, shape in SHAPES[kind].items()}
  described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  state = jax.eval_shape(transform.init, params)
  updates, after = jax.eval_shape(transform.update, params, state, params)
  assert described(updates) == described(params)
  assert described(after) == described(state)
  # State does not follow a 16-bit leaf.
  wide = {key: jnp.zeros(shape) for key, shape in SHAPES[kind].items()}
  assert described(state) == described(jax.eval_shape(transform.init, wide))


@pytest.mark.parametrize('name', TRANSFORMS)
def test_updates_lie_in_a_subspace_and_compile_once(name):
  transform, update, traces = _compiled(name)
  state = transform.init(PARAMS)
  for step in range(2 * EVERY):
    updates, state = update(_gradient(step), state)
    ranks = np.linalg.matrix_rank(np.asarray(updates['w']), rtol=1e-4)
    assert np.all(ranks >= 1)
    assert np.all(ranks <= RANK) == TRANSFORMS[name].projects
  assert len(traces) == 1


# Largest difference that a mesh makes, over the norm of the update: sums in another order. Between
# its own singular vectors Adam divides it by itself, see above; five rounds of Newton-Schulz
# amplify it by 3.4 a round.
FROM_A_MESH = dict.fromkeys(TRANSFORMS, 1e-5) | {'galore_both': 1e-3, 'muon': 1e-4}


@pytest.mark.parametrize(
  ('fsdp', 'tensor'),
  [(4, 2), pytest.param(8, 1, marks=pytest.mark.slow), pytest.param(1, 8, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize('name', TRANSFORMS)
def test_sharded_update_equals_unsharded(name, fsdp, tensor):
  transform, plain, _ = _compiled(name)
  rules = [('', PartitionSpec(None, 'fsdp', 'tensor'))]
  params = sharding.param_shardings(PARAMS, rules, sharding.make_mesh(1, fsdp, tensor))
  state = transform.init(PARAMS)
  shardings = params, sharding.state_shardings(state, PARAMS, params)
  update = lambda gradient, state: transform.update(gradient, state, PARAMS)
  sharded = jax.jit(update, in_shardings=shardings, out_shardings=shardings)
  other = jax.device_put(state, shardings[1])
  for step in range(EVERY + 2):
    gradient = _gradient(step)
    expected, state = plain(gradient, state)
    updates, other = sharded(jax.device_put(gradient, shardings[0]), other)
    assert updates['w'].sharding.shard_shape(updates['w'].shape) == (3, 16 // fsdp, 32 // tensor)
    off = np.linalg.norm(updates['w'] - expected['w']) / np.linalg.norm(expected['w'])
    assert off < FROM_A_MESH[name]
  if TRANSFORMS[name].projects:
    assert np.linalg.matrix_rank(np.asarray(updates['w'][0]), rtol=1e-3) <= RANK


@pytest.mark.parametrize('name', TRANSFORMS)
def test_state_bytes_match_the_docstring_formula(name):
  shapes = SHAPES['stacked']
  params = {key: jnp.zeros(shape) for key, shape in shapes.items()}
  state = jax.tree.leaves(jax.eval_shape(TRANSFORMS[name].make().init, params))
  numbers = sum(layers * TRANSFORMS[name].state(m, n) for layers, m, n in shapes.values())
  counters = sum(x.ndim == 0 for x in state)
  assert sum(x.size * x.dtype.itemsize for x in state) == 4 * numbers + 4 * counters


@pytest.mark.parametrize('name', TRANSFORMS)
def test_resume_midway_is_bit_exact(name):
  _, midway = _run(name, range(2))
  restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), midway)
  whole, resumed = _run(name, range(5)), _run(name, range(2, 5), restored)
  jax.tree.map(np.testing.assert_array_equal, whole, resumed)


@pytest.mark.parametrize('name', TRANSFORMS)
def test_composes_with_chain_partition_and_multi_steps(name):
  params = {**PARAMS, 'bias': jnp.zeros(20)}
  gradient = {**_gradient(0), 'bias': jnp.ones(20)}
  expected, _ = _run(name, range(1))
  whole = optax.partition(
    {'matrix': optax.chain(TRANSFORMS[name].make(), optax.scale(-0.5)), 'rest': optax.sgd(1.0)},
    {'w': 'matrix', 'bias': 'rest'},
  )
  accumulated = optax.MultiSteps(whole, 2)
  state = accumulated.init(params)
  update = jax.jit(accumulated.update)
  updates, state = update(gradient, state, params)
  np.testing.assert_array_equal(updates['w'], 0)
  updates, state = update(gradient, state, params)
  # The mean of two equal gradients is exact; only the order of sums differs.
  np.testing.assert_allclose(updates['w'], -0.5 * expected['w'], atol=2e-4)
  np.testing.assert_allclose(updates['bias'], -1.0)
