"""Adapters through every step of a config: the same training, on any mesh, and what it costs."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import adapters, build, checkpoint, config, plan, sharding, weights
from memjax.evaluate import place
from tests import hlo

MODEL = dict(loss_chunk=64, vocab=64, layers=2, hidden=32, intermediate=64, kv_heads=4)
BATCH, LENGTH = 8, 8


def small_config(step='whole_tree', rank=4, optimizer=None, adapter=None, **changes):
  c = config.default()
  c.model, c.model_args = 'llama_tiny', dict(MODEL)
  c.step, c.batch_size, c.seq_len = step, BATCH, LENGTH
  c.schedule.warmup_ratio = 0.0
  c.optimizer = config.optimizer(**(optimizer or dict(name='adamw', learning_rate=0.01)))
  c.adapter = config.adapter('lora', rank=rank, **(adapter or {}))
  c.update(changes)
  return c


def parts_of(c, axes=(1, 1, 1)):
  mesh = sharding.make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])
  return build.build(c, mesh)


def batch_of(parts, index):
  tokens = np.random.default_rng(index).integers(0, 64, (BATCH, LENGTH + 1), np.int32)
  rows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:]}
  rows['weights'] = np.ones((BATCH, LENGTH), np.float32)
  return place(lambda start, stop: {k: v[start:stop] for k, v in rows.items()}, parts.batch)


def train(parts, steps, state=None):
  if state is None:
    state = parts.init(jax.random.key(0))
  losses = []
  for i in steps:
    state, metrics = parts.step(state, batch_of(parts, i))
    losses.append(float(metrics['train/loss']))
  return parts.flush(state), losses


def values(state):
  return jax.device_get(adapters.trainable(state['params']))


def assert_frozen_is_as_drawn(c, state):
  drawn = parts_of(c).init(jax.random.key(0))
  before, after = map(adapters.detach, (drawn['params'], state['params']))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(before), jax.device_get(after))


@pytest.mark.slow
@pytest.mark.parametrize('step', ['whole_tree', pytest.param('layerwise', marks=pytest.mark.slow)])
def test_every_mesh_trains_the_same_factors(step):
  c = small_config(step, remat='full')
  one, losses = train(parts_of(c), range(3))
  assert losses[0] - losses[2] > 1e-3
  many, spread = train(parts_of(c, (2, 2, 2)), range(3))
  np.testing.assert_allclose(spread, losses, rtol=1e-6)
  # Of order 0.03 after three updates at 0.01.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), values(many), values(one)
  )
  moved = values(one)['blocks']['attn']['q']['kernel']['b']
  assert np.abs(moved).max() > 0.01
  assert_frozen_is_as_drawn(c, one)
  kernel = many['params']['blocks']['attn']['q']['kernel']
  assert tuple(kernel.base.sharding.spec) == (None, 'fsdp', 'tensor')
  assert tuple(kernel.a.sharding.spec) == (None, 'fsdp', None)
  assert tuple(kernel.b.sharding.spec) == (None, None, 'tensor')
  row = many['params']['blocks']['attn']['o']['kernel']
  assert tuple(row.a.sharding.spec) == (None, 'tensor', None)


@pytest.mark.slow
def test_layer_by_layer_trains_the_factors_of_the_ordinary_step():
  rest = dict(rest='norm|embed')
  whole, losses = train(parts_of(small_config(adapter=rest)), range(3))
  apart, same = train(parts_of(small_config('layerwise', adapter=rest, remat='full')), range(3))
  np.testing.assert_allclose(same, losses, rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), values(apart), values(whole)
  )
  assert values(apart)['embed']['embedding'] is not None


MEZO = dict(name='mezo', learning_rate=1e-2, eps=0.1, noise='rademacher')


@pytest.mark.slow
def test_streamed_from_the_host_they_have_the_bits_of_the_zeroth_order_step():
  c = small_config('zeroth_order', optimizer=MEZO)
  here, losses = train(parts_of(c), range(2))
  streamed = parts_of(small_config('streamed', optimizer=MEZO))
  kernel = streamed.state['params']['blocks']['attn']['q']['kernel']
  assert kernel.base.sharding.memory_kind == kernel.a.sharding.memory_kind == 'pinned_host'
  there, same = train(streamed, range(2))
  np.testing.assert_allclose(same, losses, rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), values(there), values(here)
  )
  assert np.abs(values(here)['blocks']['attn']['q']['kernel']['b']).max() > 1e-4
  assert_frozen_is_as_drawn(c, here)
  assert_frozen_is_as_drawn(c, there)


def assert_resumes(parts, directory):
  """Two updates, a checkpoint and two more are four updates, whose state is returned."""
  whole, losses = train(parts, range(4))
  assert np.isfinite(losses).all()
  assert len(set(losses)) == 4
  half, first = train(parts, range(2))
  with checkpoint.Checkpoints(directory / 'saved', every=1) as checkpoints:
    checkpoints.maybe_save(half, 2, {}, force=True)
  del half
  with checkpoint.Checkpoints(directory / 'saved', every=1) as checkpoints:
    restored = checkpoints.restore(parts.state)
  resumed, second = train(parts, range(2, 4), restored.state)
  assert first + second == losses
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))
  return whole


@pytest.mark.slow
@pytest.mark.parametrize(
  ('step', 'changes'),
  [
    ('whole_tree', dict(weights='int8')),
    pytest.param(
      'layerwise', dict(weights='int8', remat='full', offload_state=1.0), marks=pytest.mark.slow
    ),
    pytest.param('lisa', dict(remat='full'), marks=pytest.mark.slow),
    pytest.param('zeroth_order', dict(optimizer=MEZO), marks=pytest.mark.slow),
  ],
)
def test_a_resumed_run_has_the_same_bits(step, changes, tmp_path):
  parts = parts_of(small_config(step, adapter=dict(dropout=0.2), **changes), (1, 2, 1))
  assert_resumes(parts, tmp_path)


def test_the_backward_pass_makes_nothing_of_a_frozen_matrixs_size():
  # One layer, whose gradient would be an array of the matrix's shape; sizes meet nowhere else.
  m, n, rank = 40, 56, 4
  spec = adapters.LoRA(rank=rank)
  params = adapters.attach({'w': jnp.zeros((m, n))}, spec, jax.random.key(0))
  x, y = jnp.ones((3, m)), jnp.ones((3, n))

  def loss(trained, frozen):
    whole = weights.replaced(frozen, trained)
    return jnp.mean((jnp.sin(weights.dot(jnp.sin(x), whole['w'])) - y) ** 2)

  gradient = jax.jit(jax.grad(loss))
  traced = str(jax.make_jaxpr(jax.grad(loss))(adapters.trainable(params), params))
  text = gradient.lower(adapters.trainable(params), params).compile().as_text()
  made = [line for line in text.splitlines() if f'f32[{m},{n}]' in line and ' = f32' in line]
  made = [line for line in made if re.search(rf'= f32\[{m},{n}\]', line)]
  assert all('parameter(' in line for line in made), made
  assert f'f32[{m},{rank}]' in traced


def test_devices_reduce_gradients_of_factors_alone():
  c = small_config(batch_size=8)
  compiled = parts_of(c, (8, 1, 1)).step.lower(*_shapes(c, (8, 1, 1))).compile()
  largest = max(hlo.elements(found) for found in hlo.collectives(compiled.as_text()))
  # The largest factor of both layers, [2, 64, 4]; the smallest frozen matrix has 1,024 numbers.
  assert 0 < largest <= 2 * 64 * 4


def _shapes(c, axes):
  parts = parts_of(c, axes)
  return parts.state, parts.batch


def test_frozen_weights_have_no_state_and_the_receipt_counts_their_gradients_as_none():
  parts = parts_of(small_config())
  moments = sum(x.size for x in jax.tree.leaves(parts.state['opt']) if x.ndim)
  factors = sum(x.size for x in jax.tree.leaves(adapters.trainable(parts.state['params'])))
  assert moments == 2 * factors
  found = plan.argument_parts(parts.state, parts.batch)
  assert found['adapters'] == 4 * factors
  assert found['moments'] == 8 * factors


# Beside the name, what a few updates need to show that the method acts.
KIN = {name: {} for name in adapters.ADAPTERS if name not in ('none', 'lora')}
KIN |= {'relora': dict(every=2), 'rso': dict(every=2)}
STEPS = ('whole_tree', 'layerwise', 'zeroth_order', 'hybrid', 'streamed')
# A streamed step is one update behind, and a layer-by-layer one has no features of all layers.
REFUSED = [('relora', 'streamed'), ('rso', 'streamed'), ('switchlora', 'streamed')]
REFUSED += [('pc_lora', 'layerwise')]
CROSSED = [pair for pair in itertools.product(KIN, STEPS) if pair not in REFUSED]


@pytest.mark.parametrize(('name', 'step'), REFUSED)
def test_what_cannot_cross_is_refused(name, step):
  optimizer = MEZO if step == 'streamed' else None
  c = small_config(step, optimizer=optimizer, remat='full')
  c.adapter = config.adapter(name, **{'rank': 4, **KIN[name]})
  with pytest.raises(ValueError, match='config'):
    parts_of(c)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'step'), CROSSED)
def test_every_adapter_goes_through_every_step_and_resumes(name, step, tmp_path):
  values_only = step in ('zeroth_order', 'hybrid', 'streamed')
  optimizer = MEZO if values_only else dict(name='vector_adam', learning_rate=0.01)
  c = small_config(step, optimizer=optimizer, remat='full')
  c.adapter = config.adapter(name, **{'rank': 4, **KIN[name]})
  if step == 'streamed' and hasattr(adapters.ADAPTERS[name], 'restart'):
    # Whose parameters are one update behind, which a restart would lose.
    with pytest.raises(ValueError, match=r"restarts the optimizer .* set config.step='whole_tree'"):
      parts_of(c)
    return
  parts = parts_of(c, (1, 2, 1))
  whole = assert_resumes(parts, tmp_path)
  merged = adapters.merge(adapters.at_rest(parts.view(whole['params'])))
  assert not any(map(weights.is_weight, jax.tree.leaves(merged, is_leaf=weights.is_weight)))
