"""Blocks streamed from host memory: the bits of the step that holds them on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import sharding, transforms, weights
from memjax.estimators import methods, noise
from memjax.estimators.spsa import dense
from memjax.models import create
from memjax.naming import path_string
from memjax.steps import streamed, streams
from memjax.weights import Perturbed

EPS, DECAY = 1e-2, 0.1
TINY = dict(vocab=64, hidden=16, intermediate=32, heads=2, layers=2, positions=8)
SEED = 5


def rate(count):
  return 0.03 / (1 + count)


def batch_of(i):
  tokens = np.random.default_rng(i).integers(0, 64, (2, 9), dtype=np.int32)
  ones = jnp.ones((2, 8))
  return {'tokens': jnp.array(tokens[:, :-1]), 'targets': jnp.array(tokens[:, 1:]), 'weights': ones}


def keys(path, step, leaf):
  name = path_string(path)
  layers = jnp.arange(leaf.shape[0]) if name.startswith('blocks/') else None
  return noise.rademacher.key(jax.random.key(SEED), step, name, layers)


def unstreamed(model, rounding):
  """The same method with all parameters at hand, from its definition."""

  def step(params, number, batch):
    def see(side):
      def perturb(path, leaf):
        key = keys(path, number, weights.dense(leaf))
        return Perturbed(leaf, key, jnp.full(key.shape[:-1], side, jnp.float32), noise.rademacher)

      return jax.tree.map_with_path(perturb, params, is_leaf=weights.is_weight)

    plus, minus = [model.loss(see(side), batch) for side in (EPS, -EPS)]
    slope = (plus[0] / plus[1] - minus[0] / minus[1]) / (2 * EPS)

    def update(path, leaf):
      z = noise.rademacher.draw(keys(path, number, leaf), leaf.shape)
      decay = DECAY * leaf.astype(jnp.float32) if leaf.ndim > 1 else 0
      return -rate(number) * (slope * z + decay)

    updates = jax.tree.map_with_path(update, weights.dense(params))
    key = None if rounding is None else jax.random.fold_in(rounding, number)
    return transforms.apply_updates(params, updates, key), slope

  return jax.jit(step)


def method_of(rounding=None, **options):
  options = dict(noise='rademacher', seed=SEED) | options
  transform = methods.mezo(
    rate, EPS, weight_decay=DECAY, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p), **options
  )
  directions = dense(noise.family(options['noise']), options['seed'])
  return streamed.Method(transform, directions, EPS, rounding_key=rounding)


def on_host(params, model, mesh):
  """Parameters with the blocks' matrices in host memory, and their shardings."""
  where = sharding.param_shardings(weights.dense(params), model.SHARDING, mesh)
  where = streams.place(sharding.weight_shardings(params, where), params)
  return jax.device_put(params, where), where


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def start(model, mesh, method, store=lambda matrix: matrix):
  params = jax.jit(lambda key: model.init(key, store))(jax.random.key(0))
  placed, where = on_host(jax.tree.map(jnp.copy, params), model, mesh)
  state = streamed.init_state(lambda key: placed, method, None)
  shardings = {'params': where}
  step = jax.jit(streamed.make_train_step(model, method, shardings=shardings), donate_argnums=0)
  flush = jax.jit(streamed.make_flush(method, shardings=shardings))
  return params, state, step, flush


@pytest.mark.parametrize('form', ['f32', 'bf16', 'int8'])
@pytest.mark.parametrize('family', ['opt', 'llama'])
def test_flushed_it_has_the_bits_of_the_unstreamed_step(family, form):
  dtype = 'float32' if form == 'f32' else 'bfloat16'
  sizes = TINY if family == 'opt' else {k: v for k, v in TINY.items() if k != 'positions'}
  model = create(f'{family}_tiny', **sizes, param_dtype=dtype)
  rounding = None if form == 'f32' else jax.random.key(7)
  store = weights.quantise if form == 'int8' else lambda matrix: matrix
  params, state, step, flush = start(model, one_device(), method_of(rounding), store)
  reference = unstreamed(model, rounding)
  slopes = []
  for i in range(3):
    state, metrics = step(state, batch_of(i))
    slopes.append(metrics['zo/slope'])
    before, (params, slope) = params, reference(params, i, batch_of(i))
    assert abs(slope) == slopes[-1] != 0
    # One update behind, until flushed.
    assert_same_bits(state['params'], before)
  assert_same_bits(flush(state)['params'], params)
  assert state['params']['blocks']['mlp']['up']['kernel'] is not None


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
