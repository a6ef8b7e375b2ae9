"""The zeroth-order step: against closed forms, over meshes, killed and resumed, replayed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import estimators, weights
from memjax.estimators import methods
from memjax.estimators.estimator import find
from memjax.steps import diagnostics, whole_tree, zeroth_order
from memjax.steps.replay import make_step, replay
from tests import hlo
from tests.models import tiny

BATCH = tiny.batch_of(tiny.make(), (8, 8))
OPTIMIZERS = {
  'mezo': lambda: methods.mezo(1e-4, form='weights', log_steps=8, weight_decay=0.1),
  'mezo_momentum': lambda: methods.mezo_momentum(1e-4, form='weights', log_steps=8, samples=2),
  'zo_adam': lambda: methods.zo_adam(1e-4, form='weights', log_steps=8, noise='rademacher'),
  'sphere': lambda: methods.mezo(1e-4, form='weights', log_steps=8, noise='sphere', sides=1),
  'lozo': lambda: methods.lozo(1e-4, form='weights', log_steps=8, refresh_every=2),
  'lozo_m': lambda: methods.lozo_m(1e-4, form='weights', log_steps=8, refresh_every=2),
  'subzero': lambda: methods.subzero(1e-4, 4, form='weights', log_steps=8, refresh_every=2),
  'blockwise': lambda: methods.mezo(1e-4, form='weights', log_steps=8, blockwise=True),
}


# The others go with the slow tests: their parts are those of these, put together otherwise.
QUICK = ('mezo', 'lozo_m', 'subzero', 'blockwise')
NAMES = [
  name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS
]


def loss(params, batch):
  """A model of few leaves, which compiles soon: an embedding, three layers, a head."""

  def layer(x, p):
    return x + jnp.tanh(weights.dot(x, p['kernel']) + weights.materialize(p['bias'])[None]), None

  x = weights.take(params['embed']['embedding'], batch['tokens'].reshape(-1))
  x, _ = jax.lax.scan(layer, x, params['blocks'])
  logits = weights.dot(x, params['head']['kernel'])
  targets = batch['targets'].reshape(-1)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(losses * batch['weights'].reshape(-1)), jnp.sum(batch['weights'])


def draw_params(dtype=jnp.float32):
  shapes = {
    'blocks': {'bias': (3, 16), 'kernel': (3, 16, 16)},
    'embed': {'embedding': (64, 16)},
    'head': {'kernel': (16, 64)},
  }
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda shape: jnp.asarray(0.3 * rng.standard_normal(shape), dtype),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def start(transform, dtype=jnp.float32):
  params = draw_params(dtype)
  return whole_tree.init_state(lambda key: params, transform, jax.random.key(0))


@functools.cache
def compiled(name):
  transform = OPTIMIZERS[name]()
  step = zeroth_order.make_train_step(loss, transform)
  return transform, jax.jit(step, donate_argnums=0)


@functools.cache
def trained(name):
  """State after four steps, as numpy."""
  transform, step = compiled(name)
  state = start(transform)
  for _ in range(4):
    state, metrics = step(state, BATCH)
  return jax.device_get((state, metrics))


def assert_same(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


each_name = pytest.mark.parametrize(
  'name',
  [pytest.param(n, marks=pytest.mark.slow) if n in ('subzero', 'lozo_m') else n for n in NAMES],
)


@each_name
def test_layers_are_updated_as_the_chain_alone_would(name):
  """The step against `update` and `apply_updates` on plain arrays, in a function of its own."""
  transform, step = compiled(name)
  state, metrics = step(start(transform), BATCH)
  count = BATCH['weights'].sum()
  value_fn = lambda params: loss(params, BATCH)[0] / count
  before = start(transform)

  @jax.jit
  def alone(params, opt):
    updates, opt = transform.update(None, opt, params, value_fn=value_fn)
    return optax.apply_updates(params, updates), opt

  params, opt = alone(before['params'], before['opt'])
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), params, before['params'])
  assert min(jax.tree.leaves(moved)) > 0
  # Slopes are differences of values over 2e-3, which amplifies their rounding.
  np.testing.assert_allclose(find(state['opt']).slopes, find(opt).slopes, rtol=1e-2, atol=1e-2)
  scale = max(jax.tree.leaves(moved))
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-2 * scale)
  jax.tree.map(near, state['params'], params)
  assert int(state['step']) == 1
  assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize('what', ['step', 'step with a log', 'replay'])
def test_no_weights_are_copied(what):
  """What is read of them for metrics and log is read before they are written over: JAX 0.10 copied
  2 MiB of them twice on a CPU, replays once with any JAX.
  """
  shapes = {
    'blocks': {'bias': (8, 256), 'kernel': (8, 256, 256)},
    'embed': {'embedding': (64, 256)},
    'head': {'kernel': (256, 64)},
  }
  shape = lambda x: jax.ShapeDtypeStruct(x, jnp.float32)
  params = jax.tree.map(shape, shapes, is_leaf=lambda x: isinstance(x, tuple))
  transform = methods.mezo(1e-4, form='weights', log_steps=0 if what == 'step' else 8)
  init = lambda params: whole_tree.init_state(lambda key: params, transform, jax.random.key(0))
  if what == 'replay':
    step, given = make_step(transform), jnp.zeros((1, 1))
  else:
    step, given = zeroth_order.make_train_step(loss, transform), BATCH
  program = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(init, params), given).compile()
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes > 2**21
  assert memory.temp_size_in_bytes < 2**20


@each_name
def test_a_replay_gives_the_bits_of_the_run(name, tmp_path):
  transform, _ = compiled(name)
  state, _ = trained(name)
  estimators.save_log(tmp_path / 'log.npz', estimators.find_log(state['opt']))
  log = estimators.load_log(tmp_path / 'log.npz')
  params = start(transform)['params']
  assert_same(replay(transform, params, log), state['params'])
  assert (np.asarray(params['head']['kernel']) != state['params']['head']['kernel']).any()


ROUNDING = jax.random.key(1)


@functools.cache
def rounded():
  """Optimizer, start and state after each of four steps of a run whose 16 bits are rounded
  stochastically, with a momentum.
  """
  transform = methods.mezo_momentum(1e-3, form='weights', log_steps=8, noise='rademacher')
  step = jax.jit(zeroth_order.make_train_step(loss, transform, rounding_key=ROUNDING))
  states = [start(transform, jnp.bfloat16)]
  for _ in range(4):
    states.append(step(states[-1], BATCH)[0])
  return transform, states


def test_a_replay_rounds_as_the_run_did_and_begins_at_any_checkpoint():
  transform, (begin, _, middle, _, end) = rounded()
  log = estimators.find_log(end['opt'])
  assert_same(replay(transform, begin['params'], log, rounding_key=ROUNDING), end['params'])
  rest = replay(transform, middle['params'], log, opt=middle['opt'], rounding_key=ROUNDING)
  assert_same(rest, end['params'])
  assert_same(
    replay(transform, begin['params'], log, steps=2, rounding_key=ROUNDING), middle['params']
  )
  with pytest.raises(ValueError, match='begins after step 2'):
    replay(transform, middle['params'], log, opt=middle['opt'], steps=1)
  other = log._replace(slopes=log.slopes.at[1].set(0.5))
  with pytest.raises(ValueError, match='does not belong to this optimizer state'):
    replay(transform, middle['params'], other, opt=middle['opt'])
  with pytest.raises(ValueError, match='weights before step 2 are not those of the run'):
    replay(transform, begin['params'], log, opt=middle['opt'], rounding_key=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(key=None), 'the weights before step 1 are not'),
    (dict(key=jax.random.key(2)), 'the weights before step 1 are not'),
    (dict(seed=1), 'the weights before step 1 are not'),
    (dict(noise='gaussian'), 'the weights before step 1 are not'),
    (dict(learning_rate=2e-3), 'step 0 of the log had learning rate'),
    (dict(momentum=0.5), 'the weights before step 2 are not'),
  ],
)
def test_a_replay_refuses_what_the_run_was_not(changes, message):
  _, states = rounded()
  key = changes.pop('key', ROUNDING)
  options = dict(learning_rate=1e-3, form='weights', log_steps=8, noise='rademacher') | changes
  log = estimators.find_log(states[-1]['opt'])
  with pytest.raises(ValueError, match=message):
    replay(methods.mezo_momentum(**options), states[0]['params'], log, rounding_key=key)


def test_metrics_of_slopes():
  """Against their definitions, with one direction and with three; of nothing, nothing."""
  value = jnp.float32(4)
  state = estimators.spsa(0.5, samples=3).init({'w': jnp.ones(2)})
  for metric in diagnostics.slope_metrics(state).values():
    assert metric == 0
  slopes = np.array([[1.0], [2.0], [6.0]], np.float32)
  several = state._replace(
    slopes=slopes, value=value, difference=jnp.float32(4), last=jnp.int32(-1)
  )
  found = diagnostics.slope_metrics(several)
  np.testing.assert_allclose(found['zo/slope'], (41 / 3) ** 0.5, rtol=1e-6)
  np.testing.assert_allclose(found['zo/slope_variance'], 7, rtol=1e-6)
  np.testing.assert_allclose(found['zo/signal_to_noise'], 3 / 7**0.5, rtol=1e-6)
  np.testing.assert_allclose(found['zo/difference_ulps'], 4 / 8 * 2**23, rtol=1e-6)

  transform = estimators.spsa(0.5, noise='rademacher')
  state, params = transform.init({'w': jnp.ones(1)}), {'w': jnp.ones(1)}
  update = jax.jit(lambda slopes, state: transform.update(None, state, params, slopes=slopes))
  for slope in (1.0, 3.0, jnp.nan, 2.0):
    _, state = update(jnp.full((1, 1), slope), state)
  found = diagnostics.slope_metrics(state)
  weights_of = 0.01 * 0.99 ** np.array([2.0, 1, 0])
  mean, square = (weights_of @ np.array([1.0, 3, 2]) ** k / weights_of.sum() for k in (1, 2))
  np.testing.assert_allclose(found['zo/slope_variance'], square - mean**2, rtol=1e-4)
  np.testing.assert_allclose(
    found['zo/signal_to_noise'], mean / (square - mean**2) ** 0.5, rtol=1e-4
  )
  assert (found['zo/skipped'], found['zo/skipped_in_a_row']) == (1, 0)


def test_a_loss_of_zero_has_finite_metrics():
  """Also one whose values are opposite."""
  for function in (lambda w: 0 * w, lambda w: w):
    transform = optax.chain(estimators.spsa(0.5, form='weights'))
    value = lambda params, batch, f=function: (f(weights.materialize(params['w'])), jnp.float32(1))
    step = zeroth_order.make_train_step(value, transform)
    state = whole_tree.init_state(lambda key: {'w': jnp.float32(0)}, transform, None)
    _, metrics = step(state, {'weights': jnp.ones(1)})
    assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize('name', ['mezo', 'lozo_m', 'subzero'])
def test_a_resumed_run_gives_the_same_bits(name):
  transform, step = compiled(name)
  state = start(transform)
  for i in range(4):
    if i in (1, 3):
      saved = jax.device_get(state)
      del state
      state = jax.tree.map(jnp.asarray, saved)
    state, _ = step(state, BATCH)
  assert_same(jax.device_get(state), trained(name)[0])


def test_a_loss_that_is_not_finite_skips_the_update_and_is_counted():
  """Also in a replay, and moments and schedules do not move."""

  def broken(params, batch):
    total, count = loss(params, batch)
    return jnp.where(batch['broken'], jnp.nan, total), count

  rate = optax.linear_schedule(1e-4, 0.0, 4)
  transform = methods.mezo_momentum(rate, form='weights', log_steps=8)
  step = jax.jit(zeroth_order.make_train_step(broken, transform))
  state, found = start(transform), []
  for bad in (False, True, False):
    before = state
    state, metrics = step(state, {**BATCH, 'broken': jnp.bool_(bad)})
    found.append((float(metrics['train/loss']), int(metrics['zo/skipped'])))
    if bad:
      assert_same(state['params'], before['params'])
      assert_same(state['opt'].inner[1], before['opt'].inner[1])
      assert int(state['step']) == 2
  assert [skipped for _, skipped in found] == [0, 1, 1]
  assert [np.isfinite(value) for value, _ in found] == [True, False, True]
  log = estimators.find_log(state['opt'])
  assert np.isnan(log.slopes[:3, 0, 0]).tolist() == [False, True, False]
  np.testing.assert_allclose(log.learning_rate[:3:2], [1e-4, 7.5e-5])
  assert_same(replay(transform, start(transform)['params'], log), state['params'])


def test_updates_under_an_ulp_survive_in_the_mean_and_not_without_rounding_stochastically():
  """A quarter of an ulp of bfloat16 a step, as in fine-tuning; many numbers tell the mean."""
  shape = (2, 256, 64)
  params = {'blocks': {'kernel': jnp.ones(shape, jnp.bfloat16)}}
  total = lambda p: jnp.sum(weights.materialize(p['blocks']['kernel']), dtype=jnp.float32)
  linear = lambda p, batch: (total(p), jnp.float32(1))
  transform = estimators.spsa(1e-2, noise='rademacher', form='weights')
  transform = optax.chain(transform, optax.scale_by_sign(), optax.scale(-1 / 1024))
  batch = {'weights': jnp.ones(1)}

  def run(key):
    step = jax.jit(zeroth_order.make_train_step(linear, transform, rounding_key=key))
    state = whole_tree.init_state(lambda key: params, transform, jax.random.key(0))
    state, metrics = step(state, batch)
    found = find(state['opt'])
    noise = estimators.rademacher
    key = noise.key(jax.random.key(0), 0, 'blocks/kernel', jnp.arange(2))
    wanted = -np.sign(found.slopes[0, 0]) * np.asarray(noise.draw(key, shape)) / 1024
    return np.asarray(state['params']['blocks']['kernel'], np.float32) - 1, wanted, metrics

  lost, _, metrics = run(None)
  assert (lost != 0).mean() == 0  # Half an ulp below 1 is 1 / 512.
  assert float(metrics['zo/update_ulps']) == 0
  moved, wanted, metrics = run(jax.random.key(1))
  # Moves of 1/128 up or 1/256 down, with odds that give 1/1024 in the mean: a standard deviation of
  # 1/400 over 16,384 numbers each.
  for sign in (-1, 1):
    mine = moved[np.sign(wanted) == sign]
    assert abs(mine.mean() - sign / 1024) < 4 / 400 / len(mine) ** 0.5
  assert float(metrics['zo/update_ulps']) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mezo', 'lozo'])
def test_halves_of_a_mesh_take_a_side_each(name):
  """With the results of one device, sending each other single numbers."""
  transform = OPTIMIZERS[name]()
  expected, wanted = jax.jit(zeroth_order.make_train_step(loss, transform))(start(transform), BATCH)
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), ('sides', 'data'), auto, devices=jax.devices()[:4])
  here = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))
  step = zeroth_order.make_train_step(loss, transform, halves=here('sides'))
  state = jax.device_put(start(transform), here())
  batch = jax.device_put(BATCH, here('data'))
  compiled = jax.jit(step, out_shardings=(here(), None)).lower(state, batch).compile()
  assert all(hlo.elements(sent) <= 2 for sent in hlo.collectives(compiled.as_text()))
  state, metrics = compiled(state, batch)
  np.testing.assert_allclose(metrics['train/loss'], wanted['train/loss'], rtol=1e-6)
  np.testing.assert_allclose(metrics['zo/slope'], wanted['zo/slope'], rtol=1e-2)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
  jax.tree.map(near, state['params'], expected['params'])


def test_refusals():
  transform, _ = compiled('mezo')
  state, _ = trained('mezo')
  log = estimators.find_log(state['opt'])
  params = start(transform)['params']
  with pytest.raises(ValueError, match='does not belong to these weights'):
    replay(transform, jax.tree.map(lambda x: x + 1, params), log)
  with pytest.raises(ValueError, match='the log ends after step 4'):
    replay(transform, params, log, steps=5)
  with pytest.raises(ValueError, match='slopes of shape'):
    replay(methods.mezo(1e-4, samples=2, log_steps=8), params, log)
  with pytest.raises(ValueError, match="optimizer's own log has room for 3 of 4 steps"):
    replay(methods.mezo(1e-4, log_steps=3), params, log)
  with pytest.raises(ValueError, match='the optimizer keeps no log'):
    replay(methods.mezo(1e-4), params, log)
  with pytest.raises(ValueError, match='0 estimators in the optimizer'):
    zeroth_order.make_apply(optax.sgd(1.0))(start(optax.sgd(1.0)))
