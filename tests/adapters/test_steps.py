"""Adapters through every step of a config: the same training, on any mesh, and what it costs."""

import collections
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import adapters, build, checkpoint, config, plan, sharding, weights
from memjax.evaluate import place
from memjax.steps import whole_tree
from tests import hlo

MODEL = dict(loss_chunk=64, vocab=64, layers=2, hidden=32, intermediate=64, kv_heads=4)
BATCH, LENGTH = 8, 8
KEY = jax.random.key(3)


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
  # With dropout in two micro-batches, each of which has masks of its own.
  changes = dict(adapter=dict(rest='norm|embed', dropout=0.2), accumulate=2, remat='full')
  whole, losses = train(parts_of(small_config(**changes)), range(3))
  apart, same = train(parts_of(small_config('layerwise', **changes)), range(3))
  np.testing.assert_allclose(same, losses, rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), values(apart), values(whole)
  )
  assert values(apart)['embed']['embedding'] is not None


def test_micro_batches_of_an_update_have_masks_of_their_own():
  """Else two equal halves would move the factors as one of them does."""
  spec = adapters.LoRA(rank=4, dropout=0.5)
  params = adapters.attach({'w': jnp.eye(16)}, spec, jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (1, 16))

  def update(rows):
    loss = lambda params, batch: (jnp.sum(weights.dot(batch['x'], params['w']) ** 2), 1.0)
    step = whole_tree.make_train_step(loss, optax.sgd(0.01), accumulate=rows)
    state = spec.advance({'step': 0, 'params': params, 'opt': optax.sgd(0.01).init({})}, KEY)
    batch = {'x': jnp.tile(x, (rows, 1)), 'weights': jnp.ones(rows)}
    return jax.jit(lambda: step(state, batch))()[0]['params']['w'].b

  assert np.abs(update(2) - update(1)).max() > 0.1 * np.abs(update(1)).max()


MEZO = dict(name='mezo', learning_rate=1e-2, eps=0.1, noise='rademacher')


@pytest.mark.slow
def test_streamed_from_the_host_they_have_the_bits_of_the_zeroth_order_step():
  c = small_config('zeroth_order', optimizer=MEZO)
  here, losses = train(parts_of(c), range(2))
  streamed = parts_of(small_config('streamed', optimizer=MEZO))
  kernel = streamed.state['params']['blocks']['attn']['q']['kernel']
  assert kernel.base.sharding.memory_kind == kernel.a.sharding.memory_kind == 'pinned_host'
  there, same = train(streamed, range(2))
  assert same == losses
  jax.tree.map(np.testing.assert_array_equal, values(there), values(here))
  assert np.abs(values(here)['blocks']['attn']['q']['kernel']['b']).max() > 1e-4
  assert_frozen_is_as_drawn(c, here)
  assert_frozen_is_as_drawn(c, there)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['relora', 'rso', 'switchlora'])
def test_streamed_restarts_are_those_on_the_device(name):
  """To rounding: what is fetched is added to W in another program. W stays in the host's memory."""
  here, losses = train(parts_of(crossed(name, 'zeroth_order')), range(5))
  streamed = parts_of(crossed(name, 'streamed'))
  there, same = train(streamed, range(5))
  np.testing.assert_allclose(same, losses, rtol=1e-6)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
  jax.tree.map(near, jax.device_get(there['params']), jax.device_get(here['params']))
  kernel = there['params']['blocks']['mlp']['up']['kernel']
  assert kernel.base.sharding.memory_kind == 'pinned_host'
  assert kernel.b.sharding.memory_kind == 'device'
  drawn = streamed.init(jax.random.key(0))['params']['blocks']['mlp']['up']['kernel']
  assert moved(drawn.base, kernel.base) > 1e-3


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


@pytest.mark.slow
def test_over_tensor_factors_add_the_rank_to_what_devices_send():
  """`x A` and `dY B'`, where a side of W is divided; all else is sent without adapters too."""

  def sent(c):
    parts = parts_of(c, (1, 1, 4))
    text = parts.step.lower(parts.state, parts.batch).compile().as_text()
    return collections.Counter(x.shape for x in hlo.collectives(text))

  adapted, model = small_config(), small_config()
  model.adapter = config.adapter('none')
  whole = sent(model)
  assert (BATCH, LENGTH, 32) in whole
  assert set(sent(adapted) - whole) == {(BATCH, LENGTH, 4)}


@pytest.mark.parametrize('stored', ['dense', 'nf4'])
def test_nor_in_a_scan_that_is_rematerialised(stored):
  """Of three layers with two matrices, one of them used transposed: no gradient of a stack, and of
  codes no stack in f32.
  """
  m, n, layers = 40, 56, 3
  store = weights.quantise_nf4 if stored == 'nf4' else lambda x: x
  params = {name: store(jnp.ones((layers, m, n))) for name in ('up', 'down')}
  params = adapters.attach(params, adapters.LoRA(rank=4, targets='up|down'), KEY)

  def loss(trained, params, x):
    @jax.checkpoint
    def block(x, layer):
      up = jnp.sin(weights.dot(x, layer['up']))
      return x + weights.dot(up, layer['down'], transpose=True), None

    return jnp.sum(jax.lax.scan(block, x, weights.replaced(params, trained))[0] ** 2)

  gradient = jax.jit(jax.grad(loss))
  text = gradient.lower(adapters.trainable(params), params, jnp.ones((3, m))).compile().as_text()
  stacks = re.findall(rf'= f32\[{layers},(?:{m},{n}|{n},{m})\]\S* ([\w-]+)\(', text)
  assert set(stacks) <= ({'parameter', 'get-tuple-element'} if stored == 'dense' else set())
  made = re.findall(rf'= f32\[(?:{m},{n}|{n},{m})\]\S* ([\w-]+)\(', text)
  assert 'dot' not in made


@pytest.mark.parametrize(
  'spec', [adapters.LoRA(rank=32), adapters.MELoRA(rank=4, blocks=4)], ids=['lora', 'melora']
)
def test_devices_reduce_factors_however_large_or_many_they_are(spec):
  """Of high ranks too, for which one device would make `x' dY`; and of blocks as they are."""
  mesh = sharding.make_mesh(data=8)
  params = {'w': adapters.attach({'w': jnp.ones((64, 64))}, spec, KEY)['w']}
  whole = jax.NamedSharding(mesh, jax.P())
  params, x = jax.device_put(params, whole), jnp.ones((1024, 64))
  assert 'matrix' in weights.forms.choose(1024, 64, 64, 32)

  def gradients(values, x):
    loss = lambda values: jnp.sum(weights.dot(x, weights.replaced(params, values)['w']) ** 2)
    return jax.grad(loss)(values)

  values = adapters.trainable(params)
  gradients = jax.jit(gradients, out_shardings=jax.tree.map(lambda _: whole, values))
  text = (
    gradients.lower(values, jax.device_put(x, sharding.batch_sharding(mesh))).compile().as_text()
  )
  found = [hlo.elements(each) for each in hlo.collectives(text)]
  assert max(found) == 64 * spec.rank


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


# Beside the name, what a few updates need to show that the method acts; and whether it did, of each
# adapted leaf before and after them.
KIN = {
  'dora': {},
  'flat_lora': dict(steps=8),
  'lora': dict(rate_ratio=16.0),
  'melora': {},
  'pc_lora': dict(fade_steps=8),
  'relora': dict(every=2),
  'rso': dict(every=2),
  'sora': dict(penalty=1e7),
  'switchlora': dict(interval=2, freeze=1),
}
ACTED = {
  'dora': lambda old, new: moved(old.magnitude, new.magnitude) > 0,
  'flat_lora': lambda old, new: new.strength.min() > 0,
  'lora': lambda old, new: moved(old.b, new.b) > 6 * moved(old.a, new.a),
  'melora': lambda old, new: moved(old.adapted.b, new.adapted.b) > 0,
  'pc_lora': lambda old, new: new.share.max() < 1,
  'relora': lambda old, new: moved(old.base, new.base) > 0,
  'rso': lambda old, new: moved(old.base, new.base) > 0,
  'sora': lambda old, new: not new.gate.any(),
  'switchlora': lambda old, new: moved(old.base, new.base) > 0,
}
STEPS = ('whole_tree', 'layerwise', 'zeroth_order', 'hybrid', 'streamed')
# Where the layers of the model and of the original are never side by side.
REFUSED = [('pc_lora', step, {}) for step in ('layerwise', 'hybrid', 'streamed', 'lisa')]
# Sums that would be rounded to few levels.
REFUSED += [
  (name, 'whole_tree', dict(weights=stored))
  for name, stored in (('relora', 'int8'), ('rso', 'nf4'), ('switchlora', 'nf4'))
]
CROSSED = list(itertools.product(KIN, STEPS))


def crossed(name, step, **changes):
  values_only = step in ('zeroth_order', 'hybrid', 'streamed')
  optimizer = MEZO if values_only else dict(name='vector_adam', learning_rate=0.01)
  c = small_config(step, optimizer=optimizer, remat='full', **changes)
  c.adapter = config.adapter(name, **{'rank': 4, **KIN[name]})
  return c


def moved(old, new):
  return np.abs(np.asarray(new) - np.asarray(old)).max()


def adapted_leaves(state):
  leaves = jax.tree.leaves(jax.device_get(state['params']), is_leaf=weights.is_weight)
  return [leaf for leaf in leaves if hasattr(leaf, 'delta')]


@pytest.mark.parametrize(('name', 'step', 'changes'), REFUSED)
def test_what_cannot_cross_is_refused(name, step, changes):
  with pytest.raises(ValueError, match=f"config.adapter '{name}' .* set config"):
    parts_of(crossed(name, step, **changes))


def test_pools_beside_streamed_weights_are_refused():
  c = crossed('switchlora', 'streamed')
  c.adapter.pool = 'device'
  with pytest.raises(ValueError, match=r"pool='device' .* set config\.adapter\.pool='keys'"):
    config.validate(c)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'step'), CROSSED)
def test_every_adapter_goes_through_every_step_acts_and_resumes(name, step, tmp_path):
  c = crossed(name, step)
  if (name, step, {}) in REFUSED:
    c.adapter.task_share = 1.0
  parts = parts_of(c, (1, 2, 1))
  before = adapted_leaves(parts.init(jax.random.key(0)))
  whole = assert_resumes(parts, tmp_path)
  after = adapted_leaves(whole)
  assert len(after) >= 7
  assert all(itertools.starmap(ACTED[name], zip(before, after, strict=True)))
  merged = adapters.merge(jax.device_get(adapters.at_rest(whole['params'])))
  assert not any(map(weights.is_weight, jax.tree.leaves(merged, is_leaf=weights.is_weight)))
