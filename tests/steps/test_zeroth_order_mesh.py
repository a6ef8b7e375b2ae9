"""The zeroth-order step of a config on eight devices: the same training, and what it sends."""

import jax
import numpy as np
import pytest

from memjax import build, config, plan, sharding
from memjax.evaluate import place
from tests import hlo


def small_config(optimizer, **changes):
  c = config.default()
  c.model, c.step, c.batch_size, c.seq_len = 'llama_tiny', 'zeroth_order', 8, 8
  c.model_args = dict(loss_chunk=64, vocab=64, layers=2, hidden=32, intermediate=48, kv_heads=4)
  c.schedule.warmup_ratio = 0.0
  c.optimizer = config.optimizer(**optimizer)
  c.update(changes)
  return c


def train(c, axes, steps=2):
  """Returns the losses and slopes, the last parameters, and the compiled step."""
  mesh = sharding.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
  parts = build.build(c, mesh)
  state = parts.init(build.root_key(c, 'params'))
  step = parts.step.lower(parts.state, parts.batch).compile()
  plan.check_donated(step, parts.state)
  found = []
  for i in range(steps):
    tokens = np.random.default_rng(i).integers(0, 64, (8, 9), np.int32)
    counted = np.ones((8, 8), np.float32)
    counted[::3, 5:] = 0  # Devices do not count equally.
    rows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': counted}
    read = lambda start, stop, rows=rows: {k: v[start:stop] for k, v in rows.items()}
    state, metrics = step(state, place(read, parts.batch))
    found.append([float(metrics['train/loss']), float(metrics['zo/slope'])])
  return np.array(found), jax.device_get(state['params']), step


MEZO = dict(name='mezo', learning_rate=1e-3, eps=0.1)
LOZO = dict(name='lozo', learning_rate=1e-3, eps=0.1)


@pytest.mark.parametrize(
  ('optimizer', 'axes'),
  [
    pytest.param(MEZO, (8, 1, 1), id='mezo-data', marks=pytest.mark.slow),
    pytest.param(LOZO, (2, 2, 2), id='lozo-mixed', marks=pytest.mark.slow),
    pytest.param(MEZO, (2, 1, 1, 2), id='mezo-sides'),
    pytest.param(LOZO, (1, 4, 1, 2), id='lozo-sides-fsdp', marks=pytest.mark.slow),
  ],
)
def test_sharded_training_is_that_of_one_device(optimizer, axes):
  one, expected, _ = train(small_config(optimizer), (1, 1, 1))
  many, params, step = train(small_config(optimizer), axes)
  np.testing.assert_allclose(many[:, 0], one[:, 0], rtol=1e-6)
  # A slope is a difference of losses over 0.2; their sums over devices round in another order.
  np.testing.assert_allclose(many[:, 1], one[:, 1], rtol=1e-4, atol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), params, expected)
  # Norms begin at 1, so this is what was moved: a hundred times the tolerance.
  assert np.abs(expected['final_norm']['scale'] - 1).max() > 1e-4
  sent = hlo.collectives(step.as_text())
  if axes == (2, 1, 1, 2):  # One side's value goes to the other; nothing is as large as a weight.
    assert 'collective-permute' in {s.kind for s in sent}
    assert all(hlo.elements(s) <= 2 for s in sent)
  if axes == (8, 1, 1):
    # A sum of losses, sent in a loop over two passes, and the count of tokens they are means over.
    assert [(s.kind, hlo.elements(s)) for s in sent] == [('all-reduce', 1)] * 2


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(step='whole_tree'), "set config.step='zeroth_order'"),
    (dict(optimizer=config.optimizer('sgd', learning_rate=1.0)), 'makes no gradient'),
    (dict(accumulate=2), 'no gradients to accumulate'),
    (dict(clip_norm=1.0), 'the norm of an estimate is that of its noise'),
    (dict(weights='int8'), 'goes with config.weights'),
    (dict(optimizer=config.optimizer(**MEZO | {'eps': 0.0})), 'eps is 0.0'),
    (dict(optimizer=config.optimizer(**LOZO, rank=33)), 'has a side below rank 33'),
    ({'mesh.sides': 3}, 'a direction has one side or two'),
    ({'mesh.sides': 2, 'optimizer.sides': 1}, 'no two forward passes to run side by side'),
    ({'mesh.sides': 2, 'step': 'streamed'}, 'no two forward passes to run side by side'),
  ],
)
def test_configs_that_contradict_themselves(changes, message):
  c = small_config(MEZO)
  with c.unlocked():
    c.update_from_flattened_dict({k: v for k, v in changes.items() if k != 'optimizer'})
    c.optimizer = changes.get('optimizer', c.optimizer)
  with pytest.raises(ValueError, match=message):
    build.build(c, sharding.make_mesh(devices=jax.devices()[:1]))


def test_two_sides_split_weights_one_way():
  mesh = sharding.make_mesh(1, 2, 2, 2)
  with pytest.raises(ValueError, match='beside two sides'):
    build.build(small_config(MEZO), mesh)


@pytest.mark.slow
@pytest.mark.parametrize('rounding', ['master', 'remainder'])
def test_what_16_bits_lose_of_an_update_is_kept(rounding):
  optimizer = dict(name='mezo', learning_rate=1e-5, eps=0.1, noise='rademacher')
  c = small_config(optimizer, param_dtype='bfloat16', rounding=rounding)
  parts = build.build(c, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
  state = parts.init(build.root_key(c, 'params'))
  kernel = lambda tree: np.asarray(tree['blocks']['mlp']['up']['kernel'], np.float32)
  start = kernel(state['params'])
  for i in range(2):
    tokens = np.random.default_rng(i).integers(0, 64, (8, 9), np.int32)
    rows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones((8, 8), 'f')}
    read = lambda start, stop, rows=rows: {k: v[start:stop] for k, v in rows.items()}
    state, _ = parts.step(state, place(read, parts.batch))
  kept, now = kernel(getattr(state['opt'], rounding)), kernel(state['params'])
  exact = kept if rounding == 'master' else now + kept
  # Nearly every weight has moved, and nearly none by as much as 16 bits show.
  assert np.mean(exact != start) > 0.9
  assert np.mean(now != start) < 0.1
