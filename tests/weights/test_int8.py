"""8-bit weights: codes against numpy, updates that survive, training that does not notice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from memjax import apply_updates, sharding, weights
from memjax.models import create
from memjax.steps import layerwise, whole_tree

MODEL = create('llama_tiny', vocab=64, hidden=128, intermediate=128)
INIT = functools.partial(MODEL.init, store=weights.quantise)
ADAM = optax.adam(1e-3)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def dense_steps(w):
  """The step between two codes, once for every number."""
  return np.repeat(np.asarray(w.scales), w.codes.shape[-2] // w.scales.shape[-2], axis=-2)


@pytest.mark.parametrize('shape', [(512, 3), (2, 172, 5), (2, 3, 64, 4)])
def test_codes_are_those_of_numpy(shape):
  x = np.asarray(draw(*shape))
  w = jax.jit(weights.quantise)(jnp.asarray(x))
  block = {512: 64, 172: 172, 64: 64}[shape[-2]]
  cut = x.reshape(*shape[:-2], shape[-2] // block, block, shape[-1])
  scales = np.abs(cut).max(-2) / 127
  np.testing.assert_allclose(w.scales, scales, rtol=1e-6)
  exact = (cut / scales[..., None, :]).reshape(shape)
  # Half a step, and where f32 puts a number in the middle.
  assert np.abs(np.asarray(w.codes, np.float32) - exact).max() <= 0.5 + 1e-4
  np.testing.assert_array_equal(w.materialize(), w.codes * dense_steps(w))


def test_quantising_again_changes_nothing():
  w = weights.quantise(draw(128, 8))
  for key in (None, jax.random.key(0)):
    again = w.add(jnp.zeros((128, 8)), key)
    # The largest code of a block is 127 again, and the quotients are whole to a few ulps.
    np.testing.assert_array_equal(again.codes, w.codes)


def test_extremes():
  x = draw(64, 4).at[:, 0].set(0).at[0, 1].set(jnp.inf).at[:, 2].set(1e-39)
  w = weights.quantise(x, key=jax.random.key(0))
  dense = np.asarray(w.materialize())
  np.testing.assert_array_equal(dense[:, [0, 2]], 0)
  assert not np.isfinite(dense[0, 1])  # A weight that broke must show in the loss.
  assert np.isfinite(dense[:, 3]).all()


@pytest.mark.parametrize('stacked', [False, True])
def test_the_mean_of_updates_survives_and_rounding_to_nearest_loses_it(stacked):
  shape = (2, 64, 32) if stacked else (64, 32)
  params = {'kernel': weights.quantise(draw(*shape))}
  steps = dense_steps(params['kernel'])
  # 3 % of a step, not where the block's largest weights are: the scales stay.
  largest = np.abs(np.asarray(params['kernel'].codes)) == 127
  update = np.where(largest, 0, 0.03 * steps).astype(np.float32)
  add = lambda key: apply_updates(params, {'kernel': update}, key)['kernel'].codes
  before = np.asarray(params['kernel'].codes)
  np.testing.assert_array_equal(add(None), before)
  keys = jax.random.split(jax.random.key(1), 200)
  in_steps = np.asarray(jax.jit(lambda: jax.lax.map(add, keys))(), np.int32) - before
  assert set(np.unique(in_steps)) <= {0, 1}
  # All numbers and keys together: a mean of 0.03 with a standard error under 3e-4.
  assert abs(in_steps.mean() / (~largest).mean() - 0.03) < 4 * (0.03 / in_steps.size) ** 0.5
  # And each number for itself: none is always left behind.
  assert (in_steps.sum(0)[~largest] > 0).mean() > 0.98  # 1 - 0.97**200 = 0.998.


def test_a_layer_alone_draws_the_noise_of_the_stack():
  params = {'blocks': {'kernel': weights.quantise(draw(3, 64, 8)), 'bias': draw(3, 8)}}
  updates = jax.tree.map(lambda x: 0.01 * jnp.ones_like(x), weights.dense(params))
  key = jax.random.key(0)
  whole = apply_updates(params, updates, key)
  take = lambda tree: jax.tree.map(lambda x: x[1:2], tree)
  one = apply_updates(take(params), take(updates), key, jnp.int32(1))
  jax.tree.map(np.testing.assert_array_equal, one, take(whole))
  assert (
    np.asarray(whole['blocks']['kernel'].codes[0]) != params['blocks']['kernel'].codes[0]
  ).any()


@pytest.mark.parametrize('transpose', [False, True])
def test_a_leaf_answers_as_its_array(transpose):
  w = weights.quantise(draw(128, 6))
  x = draw(3, 6 if transpose else 128)
  dense = np.asarray(w.materialize())
  expected = np.asarray(x) @ (dense.T if transpose else dense)
  # f32 sums of 128 terms in another order.
  np.testing.assert_allclose(weights.dot(x, w, transpose), expected, atol=1e-4)
  np.testing.assert_array_equal(weights.take(w, jnp.array([[0, 127]])), dense[[[0, 127]]])
  assert jnp.isnan(weights.take(w, jnp.array([128]))).all()


@functools.cache
def fresh():
  init = functools.partial(whole_tree.init_state, INIT, ADAM)
  return jax.device_get(jax.jit(init)(jax.random.key(0)))


def state_of():
  return jax.tree.map(jnp.asarray, fresh())


def batch(rows=8, length=16):
  tokens = np.random.default_rng(1).integers(0, 64, (rows, length + 1), dtype=np.int32)
  return {
    'tokens': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'weights': jnp.ones((rows, length)),
  }


def run(step, state, steps):
  losses = []
  for _ in range(steps):
    state, metrics = step(state, batch())
    losses.append(float(metrics['train/loss']))
  return state, losses


@functools.cache
def layer_step():
  key = jax.random.key(5)
  step = layerwise.make_train_step(MODEL, ADAM, rounding_key=key)
  return jax.jit(step, donate_argnums=0)


@pytest.mark.slow
def test_a_model_trains_as_in_f32():
  _, losses = run(layer_step(), state_of(), 20)
  dense = whole_tree.init_state(MODEL.init, ADAM, jax.random.key(0))
  step = jax.jit(whole_tree.make_train_step(MODEL.loss, ADAM))
  _, reference = run(step, dense, 20)
  assert losses[0] - losses[-1] > 0.5
  # The noise of 8 bits, a hundredth of what was learnt.
  np.testing.assert_allclose(losses, reference, atol=0.02)


@pytest.mark.slow
def test_layer_by_layer_equals_the_ordinary_step():
  key = jax.random.key(5)
  step = jax.jit(whole_tree.make_train_step(MODEL.loss, ADAM, rounding_key=key))
  ours, losses = run(layer_step(), state_of(), 2)
  theirs, expected = run(step, state_of(), 2)
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  assert_codes_agree(ours['params'], theirs['params'])


def assert_codes_agree(ours, theirs):
  """The same noise; but f32 sums in another order turn a few codes by one."""
  for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    if mine.dtype == jnp.int8:
      apart = np.abs(np.asarray(mine, np.int32) - np.asarray(other, np.int32))
      assert apart.max() <= 1
      assert apart.mean() < 1e-3


def test_codes_and_scales_are_all_that_is_kept_and_are_overwritten():
  state = state_of()
  kernels = 2 * (5 * 128 * 128 + 2 * 128 * 64)  # L (q, o, gate, up, down; k, v).
  scales = 2 * 4 * 2 * (5 * 128 + 2 * 64)  # Two blocks of 64 along m = 128.
  got = jax.tree.leaves(state['params']['blocks'])
  assert sum(x.nbytes for x in got if x.dtype == jnp.int8) == kernels
  assert sum(x.nbytes for x in got) == kernels + scales + 4 * 2 * 2 * 128  # And the norms.
  moments = [x for x in jax.tree.leaves(state['opt']) if x.ndim]
  assert {x.dtype.name for x in moments} == {'float32'}
  compiled = layer_step().lower(state, batch()).compile()
  total = sum(x.nbytes for x in jax.tree.leaves(state))
  assert compiled.memory_analysis().alias_size_in_bytes >= total


@pytest.mark.slow
def test_sharded_equals_unsharded():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  model = dataclasses.replace(MODEL, activations=sharding.batch_sharding(mesh))
  state = state_of()
  shapes = weights.dense(state['params'])
  dense = sharding.param_shardings(shapes, model.SHARDING, mesh)
  where = {
    'step': NamedSharding(mesh, PartitionSpec()),
    'params': sharding.weight_shardings(state['params'], dense),
    'opt': sharding.state_shardings(state['opt'], shapes, dense),
  }
  down = where['params']['blocks']['mlp']['down']['kernel']
  assert down.codes.spec == down.scales.spec == PartitionSpec(None, 'tensor', 'fsdp')
  step = layerwise.make_train_step(
    model, ADAM, rounding_key=jax.random.key(5), shardings=where | {'params': dense}
  )
  step = jax.jit(step, out_shardings=(where, None))
  got, losses = run(step, jax.device_put(state, where), 2)
  expected, reference = run(layer_step(), state_of(), 2)
  np.testing.assert_allclose(losses, reference, rtol=1e-5)
  assert_codes_agree(got['params'], expected['params'])


def test_a_vector_is_refused_in_a_sentence():
  with pytest.raises(ValueError, match=r'\(3,\) is no matrix'):
    weights.quantise(jnp.ones(3))
