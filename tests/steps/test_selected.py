"""Training on chosen rows: like the plain step on them, over a mesh, by moments of the chosen."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import build, checkpoint, compat, config, sharding, weights
from memjax.estimators import per_example
from memjax.models.cross_entropy import cross_entropy
from memjax.steps import selected, selectors, whole_tree
from memjax.steps.colm import colm


@dataclasses.dataclass(frozen=True)
class Toy:
  """A model in three pieces that compiles at once: two layers, a token after the other."""

  activations: Any = None

  def embed(self, params, tokens):
    return weights.take(params['embed'], tokens)

  def block(self, layer, x):
    return x + jnp.tanh(weights.dot(x, layer['v']))

  def head_loss(self, params, x, targets, counted):
    losses = cross_entropy(weights.dot(x, params['head']), targets)
    return jnp.sum(counted * losses), jnp.sum(counted)

  def loss(self, params, batch):
    x = self.embed(params, batch['tokens'])
    x, _ = jax.lax.scan(lambda x, layer: (self.block(layer, x), None), x, params['blocks'])
    return self.head_loss(params, x, batch['targets'], batch['weights'])

  def init(self, key):
    draw = lambda seed, *shape: np.random.default_rng(seed).standard_normal(shape, np.float32)
    shapes = {'embed': draw(0, 16, 8), 'blocks': {'v': 0.5 * draw(1, 2, 8, 8)}}
    return jax.tree.map(jnp.asarray, shapes | {'head': draw(2, 8, 16)})


def pool(rows):
  rng = np.random.default_rng(1)
  return {
    'tokens': jnp.asarray(rng.integers(0, 16, (rows, 6)), jnp.int32),
    'targets': jnp.asarray(rng.integers(0, 16, (rows, 6)), jnp.int32),
    'weights': jnp.asarray(rng.random((rows, 6)) < 0.8, jnp.float32),
    'source': jnp.tile(SOURCE, rows // 8),
  }


MODEL = Toy()
SOURCE = jnp.array([0, 1, 0, 2, 0, 1, 0, 1], jnp.int32)
POOL = pool(8)
KEY = jax.random.key(7)
TRANSFORM = optax.sgd(0.1)


def selector(**changes):
  return colm(
    changes.pop('model', MODEL), **{'keep': 4, 'key': KEY, 'sources': 3, 'leaf': 'v', **changes}
  )


def begin(selector):
  return selected.init_state(whole_tree.init_state(MODEL.init, TRANSFORM, KEY), selector)


@functools.cache
def plain_step():
  return jax.jit(whole_tree.make_train_step(MODEL.loss, TRANSFORM))


def test_a_step_is_the_plain_one_on_the_chosen_rows():
  chooser = selector(keep=3, keep_sources=(2,), coordinates=20)
  state = begin(chooser)
  rows, select, _ = jax.jit(chooser.choose)(state['select'], state, POOL)
  after, metrics = jax.jit(selected.selected(plain_step(), chooser))(state, POOL)
  assert 3 in rows.rows  # The only one of source 2.
  assert float(metrics['select/small']) == 1
  part = {k: x[rows.rows] for k, x in POOL.items() if k != 'source'}
  alone = {k: v for k, v in begin(chooser).items() if k != 'select'}
  expected, values = plain_step()(alone, part)
  np.testing.assert_allclose(metrics['train/loss'], values['train/loss'], rtol=1e-6)
  close = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(close, after['params'], expected['params'])
  jax.tree.map(np.testing.assert_array_equal, after['select'], select)
  assert after['select'].seen.tolist() == [4, 3, 1]


def test_a_choice_is_complete_before_the_step_on_it():
  """What the selector remembers too, or gradients of the whole pool would be kept for it."""
  chooser = selector()
  step = selected.selected(lambda state, batch: (state, {}), chooser)
  equations = jax.make_jaxpr(step)(begin(chooser), POOL).eqns
  (barrier,) = [e for e in equations if e.primitive.name == 'optimization_barrier']
  shapes = {x.aval.shape for x in barrier.outvars}
  assert shapes == {(4,), (), (64,), (3,)}  # Rows; a metric and the count; moments; sources.


def test_all_of_the_pool_trains_like_the_plain_step():
  chooser = selector(keep=8)
  after, metrics = jax.jit(selected.selected(plain_step(), chooser))(begin(chooser), POOL)
  alone = {k: v for k, v in begin(chooser).items() if k != 'select'}
  expected, values = plain_step()(alone, {k: x for k, x in POOL.items() if k != 'source'})
  assert metrics['train/loss'] == values['train/loss']
  jax.tree.map(np.testing.assert_array_equal, after['params'], expected['params'])


def test_features_are_adams_and_moments_are_of_the_chosen():
  """Two pools in numpy: per source the top coordinates, L1, greedy; source 2 is kept and unseen."""
  chooser = selector(keep=5, keep_sources=(2,), coordinates=30)
  state = begin(chooser)
  choose = jax.jit(chooser.choose)
  found = per_example.gradients(MODEL, state['params'], POOL, leaf='v')
  found = np.asarray(found, np.float64)
  mu, nu, select = np.zeros(64), np.zeros(64), state['select']
  for turn in (1, 2):
    rows, select, _ = choose(select, state, POOL)
    m, n = 0.9 * mu + 0.1 * found, 0.999 * nu + 0.001 * found**2
    f = (m / (1 - 0.9**turn)) / (np.sqrt(n / (1 - 0.999**turn)) + 1e-8)
    expected = medoids(f, 0, 2, 30) + medoids(f, 1, 2, 30)  # 4 places: 4 of 7 and 3 of 7 of them.
    if turn == 2:  # Before, all numbers are 1 or -1, and many are equal.
      assert sorted([*expected, 3]) == rows.rows.tolist()
    chosen = [row for row in rows.rows.tolist() if row != 3]
    mu, nu = m[chosen].mean(0), n[chosen].mean(0)
    np.testing.assert_allclose(select.mu, mu, rtol=0, atol=1e-5 * np.abs(mu).max())
    np.testing.assert_allclose(select.nu, nu, rtol=0, atol=1e-5 * np.abs(nu).max())


def medoids(features, source, count, coordinates):
  rows = np.flatnonzero(np.asarray(SOURCE) == source)
  x = features[rows]
  x = x[:, np.argsort(-np.abs(x.mean(0)))[:coordinates]]
  d = np.abs(x[:, None] - x[None]).sum(-1)
  chosen = []
  for _ in range(count):
    value = lambda a: (d.max() - d)[:, [*chosen, a]].max(axis=1).sum()
    chosen.append(max((a for a in range(len(rows)) if a not in chosen), key=value))
  return rows[chosen].tolist()


def test_a_single_direction_is_a_single_number_an_example():
  """Moments of multiples of one direction: the mean's square over the mean square is the same
  everywhere, however many pools; of several directions, or new ones, it is not.
  """

  def spread(chooser):
    state = begin(chooser)
    choose, select = jax.jit(chooser.choose), state['select']
    for _ in range(3):
      _, select, _ = choose(select, state, POOL)
    ratio = np.asarray(select.mu, np.float64) ** 2 / np.asarray(select.nu, np.float64)
    return ratio.std() / ratio.mean()

  official = compat.colm(MODEL, 8, keep_sources='1', sources=3, leaf='v')
  assert spread(official) < 1e-4
  assert spread(selector(features='zeroth_order', directions=1)) > 0.1


def test_eight_devices_choose_what_one_does():
  def run(devices):
    layout = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:devices]))
    chooser = selector(model=Toy(activations=layout), coordinates=16, keep=8, parts=2)
    state = begin(chooser)
    # As after some pools: features of the very first are signs, whose ties rounding decides.
    moments = dict(mu=jnp.sin(jnp.arange(64.0)) / 99, nu=(1.5 + jnp.cos(jnp.arange(64.0))) / 99)
    state['select'] = state['select']._replace(count=jnp.int32(30), **moments)
    step = jax.jit(selected.selected(plain_step(), chooser, layout))
    state, metrics = step(state, jax.device_put(pool(16), layout))
    return float(metrics['train/loss']), state['select']

  (loss, select), (expected, alone) = run(8), run(1)
  # Another choice would be another loss, and other moments.
  assert loss == pytest.approx(expected, rel=1e-6)
  np.testing.assert_allclose(select.mu, alone.mu, rtol=0, atol=1e-6 * np.abs(alone.mu).max())


def test_medoids_may_count_as_often_as_they_are_nearest():
  pool = {'weights': jnp.ones((4, 2)), 'source': jnp.zeros(4, jnp.int32), 'tokens': jnp.arange(4)}
  rows = selected.Rows(jnp.array([1, 3]), jnp.array([3.0, 1.0]))
  batch = selected.take_rows(pool, rows)
  assert set(batch) == {'weights', 'tokens'}
  assert batch['weights'].tolist() == [[3, 3], [1, 1]]
  assert batch['tokens'].tolist() == [1, 3]


def test_random_rows_have_an_address():
  chooser = selected.random_rows(3, KEY)
  draw = lambda step: chooser.choose({}, {'step': jnp.int32(step)}, POOL)[0].rows.tolist()
  assert draw(4) == draw(4)
  assert len({tuple(draw(step)) for step in range(8)}) > 4
  assert all(len(set(draw(step))) == 3 for step in range(8))


def test_small_sources_are_those_of_all_pools_so_far():
  """Source 1 has the larger part of this pool, and a small one of what was seen before."""
  chooser = selector(keep=4, coordinates=1)
  state = begin(chooser)
  before = state['select']._replace(seen=jnp.array([900, 5, 500], jnp.int32))
  rows, after, metrics = jax.jit(chooser.choose)(before, state, POOL)
  assert {1, 5, 7} <= set(rows.rows.tolist())
  assert float(metrics['select/small']) == 3
  assert after.seen.tolist() == [904, 8, 501]


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match="no features are called 'exakt'; the nearest is 'exact'"):
    selector(features='exakt')
  with pytest.raises(ValueError, match="no budgets are called 'equal'"):
    selector(budgets='equal')
  with pytest.raises(ValueError, match='keep_sources has 3, but sources are numbered below 3'):
    selector(keep_sources=(1, 3))
  with pytest.raises(ValueError, match="keep_sources is 'tiny'"):
    selector(keep_sources='tiny')
  chooser = selector()
  state = begin(chooser)
  with pytest.raises(ValueError, match='but no source, i32'):
    chooser.choose(state['select'], state, {k: POOL[k] for k in ('tokens', 'weights')})
  with pytest.raises(ValueError, match='keep is 9; of a pool of 8'):
    selected.random_rows(9, KEY).choose({}, state, POOL)


@pytest.mark.slow
def test_a_config_trains_on_chosen_rows_and_resumes_with_the_same(tmp_path):
  c = config.default()
  c.model, c.model_args = 'llama_tiny', dict(loss_chunk=64, hidden=16, intermediate=16, vocab=64)
  c.batch_size, c.seq_len, c.adapter = 16, 8, config.adapter('lora', rank=2)
  c.select.update(name='colm', keep=8, parts=2, sources=3, coordinates=8)
  parts = build.build(c, sharding.make_mesh(devices=jax.devices()[:2]))
  step = parts.step.lower(parts.state, parts.batch).compile()
  assert parts.batch['source'].shape == (16,)
  assert 'source' not in parts.eval_batch
  assert parts.eval_batch['tokens'].shape == (8, 8)  # Room for a pool need not be there.
  batch = jax.device_put(pool(16), parts.batch['source'].sharding)
  batch = {k: x if x.ndim == 1 else jnp.pad(x, ((0, 0), (0, 2))) for k, x in batch.items()}
  batch = jax.device_put(batch, parts.batch['source'].sharding)
  checkpoints = checkpoint.Checkpoints(tmp_path, every=2)

  state = parts.init(build.root_key(c, 'params'))
  for finished in (1, 2, 3):
    state, metrics = step(state, batch)
    checkpoints.maybe_save(state, finished, {})
  checkpoints.close()
  restored = checkpoint.Checkpoints(tmp_path, every=2).restore(parts.state)
  assert restored.step == 2
  again, values = step(restored.state, batch)
  assert float(values['train/loss']) == float(metrics['train/loss'])
  jax.tree.map(np.testing.assert_array_equal, again['select'], state['select'])
  assert state['select'].mu.shape == (2 * 8,)  # B [r, n] of two key-value heads of width 4.
  assert int(state['select'].count) == 3


def test_a_config_that_cannot_choose_is_refused():
  def check(match, **fields):
    c = config.default()
    c.select.update(name='colm', keep=4)
    for name, value in fields.items():
      (c.select if name in c.select else c)[name] = value
    with pytest.raises(ValueError, match=match):
      config.validate(c)

  check("config.select.name is 'colmn'; the nearest is 'colm'", name='colmn')
  check('config.select.keep is 9; of a pool of config.batch_size 8', keep=9)
  check('config.accumulate is 3', accumulate=3, batch_size=9)
  check('config.select.parts is 3, which does not divide 8', parts=3)
  check("keep_sources is '0_99'; it is 'small', 'none', or numbers", keep_sources='0_99')
  zeroth_order = config.optimizer('mezo', learning_rate=1e-6)
  check('config.select needs the layers on the device', step='streamed', optimizer=zeroth_order)
  c = config.default()
  c.select.update(name='colm', keep=4, sources=2)
  with pytest.raises(ValueError, match='the data has 3 sources, a, b, c; set config'):
    selectors.check_sources(c, ('a', 'b', 'c'))


def test_the_published_recipe():
  c = config.load(str(pathlib.Path(__file__).parents[2] / 'configs/colm_phi2.py'))
  assert (c.model, c.batch_size, c.select.keep, c.seq_len, c.steps) == ('phi_2', 128, 64, 512, 1024)
  assert (c.adapter.rank, c.adapter.alpha, c.adapter.dropout) == (128, 512, 0.05)
  assert (c.optimizer.learning_rate, c.schedule.name, c.schedule.warmup_ratio) == (
    2e-5,
    'linear',
    0.03,
  )
  state = build.build(c, sharding.make_mesh(devices=jax.devices()[:1])).state
  assert state['select'].mu.shape == (327_680,)  # As the paper says of the last value projection.
  trained = weights.trained(state['params'])['blocks']
  assert {name for name, leaf in trained['attn'].items() if leaf['kernel']} == set('qkv')
  assert {name for name, leaf in trained['mlp'].items() if leaf['kernel']} == {'up', 'down'}
