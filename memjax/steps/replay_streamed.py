"""The weights of a model larger than the device from its log: each matrix visits the device once.

Shapes in this file: `L` layers; a stacked leaf is `[L, ...]`, one layer of it `[1, ...]`; a log has
room for `K` steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memjax.estimators.estimator import find
from memjax.estimators.log import Log, find_log
from memjax.steps import slices, streams
from memjax.steps.replay import check_rows, check_start, check_step
from memjax.steps.slices import STACK
from memjax.steps.streamed import Method, State, again


def replay(
  method: Method, state: State, log: Log, *, steps: int | None = None, exact: bool = True
) -> Any:
  """Returns the parameters after a logged run, without a forward pass: as `memjax.replay` does, for
  parameters whose blocks are in the host's memory.

  Bit for bit those of a streamed run once flushed, and of `step='zeroth_order'`, whose logs are the
  same. Every matrix is fetched once, receives all updates one after the other, and is put back.
  Costs a draw of all noise a step, and one move of the blocks to the device and back.

  Memory of the device: embedding, head, norms and biases; of the blocks one matrix of one layer.
  Memory of the host: the blocks, updated in place.

  Args:
    method: As in the run; of its estimator, the transform alone is read.
    state: Training state as `memjax.steps.streamed.init_state` makes it, or of a checkpoint, whose
      later steps alone are replayed; flushed. It is given up: its memory becomes the result's.
    log: From `memjax.estimators.find_log` or `load_log`, of a run of either step.
    steps: Of the log, counted from the run's first; None all.
    exact: As in `memjax.replay`. Weights that are not those of the run are told after one layer.

  Raises:
    ValueError: as `memjax.replay`; for a state with an update to come.
  """
  if state['opt'].due:
    raise ValueError(
      'the last update of this state is not applied yet; flush it, see `streamed.make_flush`'
    )
  own, first = find_log(state['opt']), int(find(state['opt']).count)
  count = int(log.count) if steps is None else steps
  check_rows(log, own, first, count)
  if exact:
    check_start(log, own.start, own, first)
  shardings = jax.tree.map(lambda x: x.sharding, state['params'])
  walk, advance = _programs(method, state, shardings, first, count)
  params = state['params']
  rest = {name: leaf for name, leaf in params.items() if name != STACK}
  rest, made = advance(rest, log.slopes)
  blocks, rows = walk(params[STACK], log.slopes, 0, 1)  # All that the log knows of the blocks.
  _check_steps(log, made, rows, first, count, exact)
  blocks, _ = walk(blocks, log.slopes, 1, slices.count_layers(params))
  return {**rest, STACK: blocks}


def _programs(method, state, shardings, first, count):
  """Two compiled functions: of layers `begin` to `end` of the blocks, and of everything else. Both
  return what they leave and what their own log has noted.
  """
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state['params'])
  opt = jax.tree.map(jnp.copy, state['opt'])  # The state is given up.

  def updated(part, slopes, index=None):
    """Some of the parameters after the steps, and the log."""

    def one(row, carry):
      part, opt = carry
      before = {'step': row, 'params': shapes, 'opt': opt}
      return again(method, before, part, slopes[row], index)

    part, after = lax.fori_loop(first, count, one, (part, opt))
    return part, find_log(after)

  def walk(blocks, slopes, begin, end):
    places = streams.places(blocks, shardings[STACK])

    def body(index, carry):
      stacks, rows = carry
      for path, place in places.items():
        name = f'{STACK}/{path}'
        part = {name: streams.take(stacks[path], place, index)}
        part, made = updated(part, slopes, index)
        stacks[path] = streams.put(stacks[path], part[name], place, index)
        rows += made.rows
        # One after the other: the next is fetched when this one is gone.
        stacks, rows, index = lax.optimization_barrier((stacks, rows, index))
      return stacks, rows

    rows = jnp.zeros_like(find_log(opt).rows)
    stacks, rows = lax.fori_loop(begin, end, body, (streams.flatten(blocks), rows))
    return streams.unflatten(blocks, stacks), rows

  here = find(state['opt']).count.sharding
  rest = {name: where for name, where in shardings.items() if name != STACK}
  return (
    jax.jit(walk, donate_argnums=0, out_shardings=(shardings[STACK], here)),
    jax.jit(updated, donate_argnums=0, out_shardings=(rest, here)),
  )


def _check_steps(log, made, rows, first, count, exact):
  """That all steps are those of the log: `rows` are of the blocks, `made` of everything else."""
  log, seen, rates = jax.device_get((log, made.rows + rows, made.learning_rate))
  for row in range(first, count):
    check_step(log, row, seen[row] if exact else None, rates[row])
