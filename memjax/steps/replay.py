"""The weights of a zeroth-order run from its log, without a forward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memjax.estimators.estimator import find
from memjax.estimators.log import Log, find_log, fingerprint
from memjax.steps import diagnostics
from memjax.steps.zeroth_order import make_apply, measure


def replay(
  optimizer,
  params,
  log: Log,
  *,
  opt=None,
  steps: int | None = None,
  rounding_key=None,
  exact: bool = True,
) -> Any:
  """Returns the parameters after a logged run, without a forward pass.

  Bit for bit those of the run, on the same kind of device: an update draws its direction again from
  its address. Costs a draw of all noise a step, and copies the parameters once.

  Example:
    >>> import jax.numpy as jnp, optax, memjax
    >>> optimizer = memjax.mezo(0.05, log_steps=100)
    >>> params = begin = {'w': jnp.ones(3)}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(
    ...     None, state, params, value_fn=lambda p: jnp.sum(p['w'] ** 2)
    ...   )
    ...   params = optax.apply_updates(params, updates)
    >>> again = memjax.replay(optimizer, begin, memjax.estimators.find_log(state))
    >>> bool(jnp.allclose(again['w'], params['w']))
    True

  Args:
    optimizer: As in the run, with its learning rate and seed; a transform that `estimators.record`
      wraps.
    params: Weights that the run began with; with `opt`, those of a checkpoint.
    log: From `memjax.estimators.find_log` or `load_log`.
    opt: Optimizer state of that checkpoint: only the steps after it are replayed. None for the
      state before the first step.
    steps: Of the log, counted from the run's first; None all.
    rounding_key: As in the run, see `memjax.steps.zeroth_order.make_train_step`.
    exact: Refuses weights that are not those of the run in every bit. On another kind of device
      than the run's, whose noise may differ in the last place, set it to False: then nothing tells
      a wrong seed.

  Raises:
    ValueError: for a log that began with other weights, was made by another optimizer or rounding
      key, or is longer than its room.
  """
  state = _start(optimizer, params, opt)
  first = int(find(state['opt']).count)
  count = int(log.count) if steps is None else steps
  check_rows(log, find_log(state['opt']), first, count)
  if exact:
    start = int(jax.jit(fingerprint)(params)) if opt is None else find_log(opt).start
    check_start(log, start, find_log(state['opt']), first)
  again = jax.jit(make_step(optimizer, rounding_key), donate_argnums=0)
  for row in range(first, count):
    state, (seen, rate) = again(state, log.slopes[row])
    check_step(log, row, seen if exact else None, rate)
  return state['params']


def make_step(optimizer, rounding_key=None):
  """Returns `again(state, slopes f32[n, G]) -> (state, (row u32[], learning_rate f32[]))`, one step
  of a replay and what its own log has of it; to be jitted with its state donated.
  """
  optimizer = optax.with_extra_args_support(optimizer)
  advance = make_apply(optimizer, rounding_key)

  def again(state, slopes):
    opt = measure(optimizer, state, slopes=slopes)
    _, opt = diagnostics.after([], opt)
    made, row = find_log(opt), find(opt).count - 1
    return advance({**state, 'opt': opt}), (made.rows[row], made.learning_rate[row])

  return again


def _start(optimizer, params, opt):
  """The training state before the first step of a replay, a copy: the steps write over it."""
  opt = optimizer.init(params) if opt is None else opt
  state = {'step': find(opt).count, 'params': params, 'opt': opt}
  return jax.tree.map(jnp.copy, state)


def check_rows(log: Log, own: Log, first: int, count: int) -> None:
  """That the log has the steps from `first` to `count`, and the optimizer's own room for them."""
  if not first <= count <= int(log.count):
    raise ValueError(
      f'steps is {count}, but the replay begins after step {first} and the log ends after step '
      f'{int(log.count)}'
    )
  for what, room in (('log had', log), ("optimizer's own log has", own)):
    if count > len(room.learning_rate):
      raise ValueError(
        f'the {what} room for {len(room.learning_rate)} of {count} steps; replay fewer, or set '
        'log_steps as large as the run'
      )
  if own.slopes.shape[1:] != log.slopes.shape[1:]:
    raise ValueError(
      f'the log has slopes of shape {log.slopes.shape[1:]} a step, this optimizer '
      f'{own.slopes.shape[1:]}: make it with the same samples and blockwise'
    )


def check_start(log: Log, start, own: Log, first: int) -> None:
  """That a log is of a run: from the fingerprint of the weights that it began with, and its own log
  of its `first` steps.
  """
  if int(start) != int(log.start):
    raise ValueError(
      f'the log does not belong to these weights: it began with fingerprint {int(log.start):08x}, '
      f'theirs is {int(start):08x}; replay from the weights that the run began with'
    )
  if not np.array_equal(own.slopes[:first], log.slopes[:first], equal_nan=True):
    raise ValueError(
      f'the log does not belong to this optimizer state: their first {first} steps differ; take a '
      'checkpoint of the run that the log is of'
    )


def check_step(log: Log, row: int, seen, rate) -> None:
  """That a step is that of the log, by the fingerprint of rows before it, if there is one, and by
  its learning rate.
  """
  if seen is not None and seen != log.rows[row]:
    raise ValueError(
      f'the weights before step {row} are not those of the run; give the optimizer its seed, '
      'noise and options, and its rounding_key; or set exact=False on another kind of device'
    )
  if rate != log.learning_rate[row]:
    raise ValueError(
      f'step {row} of the log had learning rate {float(log.learning_rate[row])}, this optimizer '
      f'has {float(rate)}; make it with the learning rate of the run'
    )
