"""The log of a streamed run: that of the run on the device, and the parameters from it again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import checkpoint, estimators, replay, sharding, weights
from memjax.estimators.log import fingerprint
from memjax.steps import replay_streamed, streamed, streams, whole_tree, zeroth_order
from tests.steps.test_streamed import (
  Run,
  Toy,
  assert_same_bits,
  batch_of,
  init_params,
  jit,
  method_of,
  optimizer,
)

STEPS, ROOM, ROUNDING = 4, 6, 7
BAD = 2  # The step whose loss is not finite.
PLAIN, ROUNDED = dict(), dict(dtype='bfloat16')  # 16 bits are rounded stochastically.
CODES = dict(dtype='bfloat16', quantised=True)


def batch(step):
  found = batch_of(step)
  return {**found, 'weights': np.full((2, 8), np.inf, np.float32)} if step == BAD else found


def method(rounding=None, **options):
  key = None if rounding is None else jax.random.key(rounding)
  return method_of(key, optimizer(log_steps=ROOM, **options))


def method_for(form):
  return method(ROUNDING if form else None)


class Logged(Run):
  """A streamed run with a log, and the states that it went through."""

  def __init__(self, form):
    super().__init__(method_for(form), **form)
    state, self.states = self.fresh(), []
    for i in range(STEPS):
      self.states.append(jax.device_get(state))
      state, _ = self.step(state, batch(i))
    self.states.append(jax.device_get(state))
    self.log = log_of(self.states[-1])

  def flushed(self, step):
    return self.flush(jax.device_put(self.states[step], self.shardings))


@functools.cache
def logged(**form):
  return Logged(form)


def log_of(state):
  return estimators.find_log(state['opt'])


@functools.cache
def unstreamed(**form):
  """The last state of the same run with everything on the device."""
  known = method_for(form)
  state = whole_tree.init_state(lambda key: init_params(key, **form), known.transform, None)
  step = zeroth_order.make_train_step(Toy().loss, known.transform, rounding_key=known.rounding_key)
  step = jit(step)
  for i in range(STEPS):
    state, _ = step(state, batch(i))
  return jax.device_get(state)


def test_a_log_is_that_of_the_run_on_the_device():
  """Every number of it: the start, each step's slope, rate and rows before the update."""
  log = logged().log
  assert_same_bits(log, log_of(unstreamed()))
  assert log.count == STEPS
  assert np.isnan(log.slopes[:STEPS, 0, 0]).tolist() == [i == BAD for i in range(STEPS)]
  assert len(set(log.rows[:STEPS])) == STEPS - 1  # The skipped step has moved nothing.


def test_a_step_is_in_the_log_before_its_update_is_applied():
  """A state's parameters are those before the last step of its log; flushed, those after it."""
  run = logged()
  assert log_of(run.states[1]).count == 1
  flushed = run.flushed(1)
  assert_same_bits(log_of(flushed), log_of(run.states[1]))
  again = replay_streamed.replay(method(), run.fresh(), run.log, steps=1)
  assert_same_bits(again, flushed['params'])
  none = replay_streamed.replay(method(), run.fresh(), run.log, steps=0)
  assert_same_bits(none, run.states[1]['params'])


each_form = pytest.mark.parametrize(
  'form', [PLAIN, pytest.param(ROUNDED, marks=pytest.mark.slow)], ids=['f32', 'bf16']
)


@each_form
def test_a_replay_gives_the_bits_of_both_runs(form):
  """From the log of the run on the device; a step that was skipped is skipped again."""
  run, known = logged(**form), method_for(form)
  log = log_of(unstreamed(**form))
  again = replay_streamed.replay(known, run.fresh(), log)
  assert jax.tree.map(lambda x: x.sharding, again) == run.shardings['params']
  assert_same_bits(again, unstreamed(**form)['params'])
  assert_same_bits(again, run.flushed(STEPS)['params'])
  begin = init_params(None, **form)
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), *jax.device_get((again, begin)))
  assert all(jax.tree.leaves(moved))
  whole = replay(known.transform, begin, run.log, rounding_key=known.rounding_key)
  assert_same_bits(whole, again)


@pytest.mark.slow
def test_weights_of_8_bits_are_replayed_as_they_were_rounded():
  run = logged(**CODES)
  again = replay_streamed.replay(method_for(CODES), run.fresh(), run.log)
  assert_same_bits(again, run.flushed(STEPS)['params'])
  up = lambda params: params['blocks']['up']['kernel'].codes
  assert (up(jax.device_get(again)) != up(run.states[0]['params'])).any()


def test_a_resumed_run_goes_on_with_its_log_and_a_replay_begins_there(tmp_path):
  run = logged()
  state = run.flushed(2)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  with checkpoint.Checkpoints(tmp_path / 'saved', every=1) as checkpoints:
    checkpoints.maybe_save(state, 2, {}, force=True)
  with checkpoint.Checkpoints(tmp_path / 'saved', every=1) as checkpoints:
    first, second = (checkpoints.restore(shapes).state for _ in range(2))
  for i in range(2, STEPS):
    first, _ = run.step(first, batch(i))
  assert_same_bits(first, run.states[-1])
  estimators.save_log(tmp_path / 'log.npz', log_of(first))
  again = replay_streamed.replay(method(), second, estimators.load_log(tmp_path / 'log.npz'))
  assert_same_bits(again, run.flushed(STEPS)['params'])


@pytest.mark.parametrize('form', [PLAIN, CODES], ids=['f32', 'int8'])
def test_a_fingerprint_is_made_of_one_matrix_at_a_time(form):
  """That of all parameters at once; in the loop over layers each matrix is fetched once."""
  params = init_params(None, **form)
  found, whole = jax.jit(streams.fingerprint), jax.jit(fingerprint)
  assert found(params) == whole(weights.dense(params))
  scale = params['blocks']['norm']['scale'].at[1, 3].add(1)
  changed = {**params, 'blocks': {**params['blocks'], 'norm': {'scale': scale}}}
  assert found(changed) == whole(weights.dense(changed)) != whole(weights.dense(params))
  (loop,) = [
    e for e in jax.make_jaxpr(streams.fingerprint)(params).eqns if e.primitive.name == 'scan'
  ]
  moves = [e for e in loop.params['jaxpr'].eqns if e.primitive.name == 'device_put']
  arrays = jax.tree.leaves(params['blocks'])
  assert sorted(e.invars[0].aval.shape for e in moves) == sorted((1, *x.shape[1:]) for x in arrays)


@pytest.mark.slow
def test_a_mesh_has_the_log_of_one_device():
  """Under fsdp, where four bytes of each leaf are added up."""
  mesh = sharding.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
  wide, run = Run(method(), mesh), logged()
  state = wide.fresh()
  kernel = state['params']['blocks']['up']['kernel']
  assert kernel.sharding.memory_kind == 'pinned_host'
  assert kernel.addressable_shards[0].data.shape != kernel.shape
  assert jax.jit(streams.fingerprint)(state['params']) == log_of(state).start == run.log.start
  state, _ = wide.step(state, batch(0))
  assert log_of(state).rows[0] == run.log.rows[0]
  # Slopes are sums in another order; updates from given slopes have the same bits.
  again = replay_streamed.replay(method(), wide.fresh(), run.log)
  assert jax.tree.map(lambda x: x.sharding, again) == wide.shardings['params']
  assert_same_bits(again, run.flushed(STEPS)['params'])


def test_refusals():
  run = logged()
  log = run.log

  def again(log, step=0, **options):
    state = jax.device_put(run.states[step], run.shardings) if step else run.fresh()
    return replay_streamed.replay(method(), state, log, **options)

  with pytest.raises(ValueError, match='is not applied yet; flush it'):
    again(log, step=1)
  with pytest.raises(ValueError, match='does not belong to these weights'):
    again(log._replace(start=log.start + 1))
  with pytest.raises(ValueError, match='does not belong to this optimizer state'):
    replay_streamed.replay(method(), run.flushed(2), log._replace(slopes=log.slopes + 1))
  with pytest.raises(ValueError, match='the log ends after step 4'):
    again(log, steps=5)
  state = {**run.fresh(), 'opt': streamed.Delayed(False, optimizer().init({'w': jnp.ones(1)}))}
  with pytest.raises(ValueError, match='keeps no log'):
    replay_streamed.replay(method_of(), state, log)


@pytest.mark.parametrize(
  ('changes', 'form', 'message'),
  [
    (dict(seed=6), PLAIN, 'the weights before step 1 are not'),
    (dict(learning_rate=0.02), PLAIN, 'step 0 of the log had learning rate'),
    pytest.param(
      dict(rounding=8), ROUNDED, 'the weights before step 1 are not', marks=pytest.mark.slow
    ),
  ],
)
def test_a_replay_refuses_what_the_run_was_not(changes, form, message):
  """After the embedding, the head and one layer; the state is given up all the same."""
  run = logged(**form)
  state = run.fresh()
  with pytest.raises(ValueError, match=message):
    replay_streamed.replay(method(**changes), state, run.log)
