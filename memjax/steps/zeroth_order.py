"""The zeroth-order training step: forward passes, then an update in place, layer by layer.

Shapes in this file: `L` layers; a stacked leaf is `[L, ...]`, one layer of it `[1, ...]`; `n`
directions, `G` groups, see `memjax.estimators.estimator`.

The forward passes see parameters as leaves that draw their noise where they are used. What the
devices must agree on afterwards is a number for each pass; everybody draws the same directions
again and updates its own shard.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from memjax import transforms, weights
from memjax.estimators.estimator import FORGET, find, is_state
from memjax.estimators.log import Log, find_log, fingerprint, observed
from memjax.steps import held, slices
from memjax.steps.layerwise import make_advance, shardings_of
from memjax.steps.slices import STACK


def make_train_step(
  loss, transform: optax.GradientTransformation, *, rounding_key=None, shardings=None
):
  """Returns `step(state, batch) -> (state, metrics)`, to be jitted with its state donated.

  Memory beside parameters and optimizer state: that of a forward pass; the noise of one matrix; the
  estimate of one layer, and of the embedding and the head, which the compiler fuses into what uses
  them where the noise is dense. Communicates, under a data-parallel mesh, the sum of losses of each
  forward pass and the count of tokens: four bytes each.

  A step with a loss that is not finite leaves parameters and optimizer as they were, and is
  counted; the next draws other noise. `train/loss` is then that of the last step that was not
  skipped.

  Metrics beside `train/loss`, the mean over the forward passes: `zo/slope`, root mean square of the
  slopes; `zo/slope_variance`, over the directions of the step, or over recent steps when there is
  only one; `zo/signal_to_noise`, the difference of two values over the f32 resolution of the loss;
  `zo/update_ulps`, root mean square change of the weights over their unit in the last place, in the
  first row of each leaf; `zo/skipped`, steps so far.

  Args:
    loss: `loss(params, batch) -> (sum f32[], count f32[])`, which asks its leaves through
      `memjax.weights`.
    transform: An optax chain with one estimator, made with `form='weights'`. What follows it must
      update a leaf from that leaf alone, as in `memjax.steps.layerwise`.
    rounding_key: Root key of the stochastic rounding of 16-bit parameters; None rounds to nearest,
      which loses most updates, see `memjax.apply_updates`.
    shardings: `NamedSharding`s of the training state; None leaves it to the compiler.
  """
  advance = make_apply(transform, rounding_key, shardings)

  def step(state, batch):
    count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)
    params, state = state['params'], {**state, 'params': weights.trained(state['params'])}
    value_fn = lambda trained: loss(weights.replaced(params, trained), batch)[0] / count
    opt = measure(transform, state, value_fn=value_fn)
    rows, opt = _after(_first_rows(state['params']), opt)
    state = advance({**state, 'opt': opt})
    found = find(state['opt'])
    metrics = {
      'train/loss': found.value,
      **_slope_metrics(found),
      'zo/update_ulps': _ulps(rows, _first_rows(state['params'])),
      'zo/skipped': found.skipped,
    }
    return {**state, 'params': weights.replaced(params, state['params'])}, metrics

  return step


def replay(optimizer, params, log: Log, *, steps: int | None = None, rounding_key=None) -> Any:
  """Returns the parameters after a logged run, without a forward pass.

  Bit for bit those of the run, on the same kind of device: an update draws its direction again from
  its address. Costs a draw of all noise a step, and copies the parameters once.

  Args:
    optimizer: As in the run, with its learning rate; a transform that `estimators.record` wraps.
    params: Weights that the run began with.
    log: From `memjax.estimators.find_log` or `load_log`.
    steps: Replays so many; None all.
    rounding_key: As in the run, see `memjax.steps.zeroth_order.make_train_step`.

  Raises:
    ValueError: for a log that began with other weights, was made with another learning rate or
      number of directions, or is longer than its room.
  """
  count = int(log.count) if steps is None else steps
  _check_log(log, params, count)
  optimizer = optax.with_extra_args_support(optimizer)
  advance = make_apply(optimizer, rounding_key)

  def again(state, slopes):
    return advance({**state, 'opt': measure(optimizer, state, slopes=slopes)})

  again = jax.jit(again, donate_argnums=0)
  params = jax.tree.map(jnp.copy, params)  # The steps write over them.
  state = {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt': optimizer.init(params)}
  shape = find(state['opt']).slopes.shape
  if shape != log.slopes.shape[1:]:
    raise ValueError(
      f'the log has slopes of shape {log.slopes.shape[1:]} a step, this optimizer {shape}: make it '
      'with the same samples and blockwise'
    )
  for slopes in log.slopes[:count]:
    state = again(state, slopes)
  _check_rates(log, find_log(state['opt']), count)
  return state['params']


def measure(transform, state, **how) -> Any:
  """Returns the optimizer state with the slopes of this step; nothing else has moved.

  Args:
    transform: Chain with an estimator.
    state: Training state.
    **how: `value_fn`, or `slopes` to take for measured.
  """
  zeros = jax.tree.map(jnp.zeros_like, state['params'])
  transform = optax.with_extra_args_support(transform)
  _, opt = transform.update(zeros, state['opt'], state['params'], hand_on=False, **how)
  return observed(state['opt'], opt)


def make_apply(transform: optax.GradientTransformation, rounding_key=None, shardings=None):
  """Returns `apply(state) -> state`: the update for the slopes in `state['opt']`, and a step more.

  Parameters with stacked `blocks` are updated layer by layer, others at once.
  """
  transform = optax.with_extra_args_support(transform)

  def apply(state):
    times = jnp.where(find(state['opt']).skips(), 0, 1)
    params, blockwise = state['params'], find(state['opt']).slopes.shape[-1] > 1
    # Blockwise, a layer's slope is one of many; leaves are then updated whole.
    if isinstance(params, dict) and STACK in params and not blockwise:
      params, opt = _by_layers(transform, state, times, rounding_key, shardings)
    else:
      params, opt = _at_once(transform, state, times, rounding_key)
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}

  return apply


def _by_layers(transform, state, times, rounding_key, shardings):
  """Updates in place: what is skipped is a loop that runs no times, which copies nothing."""
  opt, treedef = jax.tree.flatten(state['opt'])
  params = state['params']
  slots = slices.plan(transform, params)
  holder = held.together(slots, shardings_of(treedef, shardings))
  advance = make_advance(transform, state, treedef, holder, rounding_key)
  zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # Gradients, which an estimator ignores.
  layers = slices.count_layers(params)

  def advance_layer(index, carry):
    grads = {STACK: zeros(slices.take(params[STACK], 0))}
    return advance(carry, grads, jnp.asarray(index, jnp.int32))

  def advance_rest(_, carry):
    return advance(carry, {k: zeros(v) for k, v in params.items() if k != STACK}, None)

  carry = lax.fori_loop(0, times * layers, advance_layer, {'params': params, 'opt': opt})
  carry = lax.fori_loop(0, times, advance_rest, carry)
  return carry['params'], treedef.unflatten(carry['opt'])


def _at_once(transform, state, times, rounding_key):
  key = None if rounding_key is None else jax.random.fold_in(rounding_key, state['step'])

  def advance(_, carry):
    params, opt = carry
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, opt = transform.update(zeros, opt, params, measured=True)
    return transforms.apply_updates(params, updates, key), opt

  return lax.fori_loop(0, times, advance, (state['params'], state['opt']))


def _slope_metrics(found):
  slopes = found.slopes
  finished = jnp.maximum(found.count - found.skipped, 1).astype(slopes.dtype)
  mean, square = found.moments / (1 - FORGET**finished)
  over_steps = square - mean**2
  return {
    'zo/slope': jnp.sqrt(jnp.mean(slopes**2)),
    'zo/slope_variance': jnp.var(slopes, ddof=1) if slopes.size > 1 else over_steps,
    'zo/signal_to_noise': found.signal,
  }


def _first_rows(params):
  """The first `[n]` of each leaf, few numbers that stand for all."""
  leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim]
  return [leaf[(0,) * (leaf.ndim - 1)] for leaf in leaves]


def _after(read, opt):
  """Makes the update wait for what was read: else all parameters are copied, to read it later."""
  opt, treedef = jax.tree.flatten(opt, is_leaf=is_state)
  at = next(i for i, leaf in enumerate(opt) if is_state(leaf))
  read, count = lax.optimization_barrier((read, opt[at].count))
  opt[at] = opt[at]._replace(count=count)
  return read, treedef.unflatten(opt)


def _ulps(old, new):
  """Root mean square change, over the unit in the last place of the old number."""

  def square(old, new):
    bits = jnp.finfo(old.dtype).nmant
    old, new = old.astype(jnp.float32), new.astype(jnp.float32)
    exponent = jnp.frexp(jnp.abs(old))[1] - 1
    # A weight of zero moves by any number of its own units: those of the smallest normal number.
    unit = jnp.ldexp(jnp.ones_like(old), jnp.maximum(exponent, -100) - bits)
    return jnp.sum(((new - old) / unit) ** 2 * (old != 0))

  total = sum(square(*pair) for pair in zip(old, new, strict=True))
  return jnp.sqrt(total / sum(x.size for x in old))


def _check_log(log, params, count):
  if count > int(log.count):
    raise ValueError(f'steps is {count}, but the log ends after step {int(log.count)}')
  if count > len(log.learning_rate):
    raise ValueError(
      f'the log had room for {len(log.learning_rate)} of {count} steps; replay fewer, or log with '
      'log_steps as large as the run'
    )
  if (found := int(jax.jit(fingerprint)(params))) != int(log.start):
    raise ValueError(
      f'the log does not belong to these weights: it began with fingerprint {int(log.start):08x}, '
      f'theirs is {found:08x}; replay from the weights that the run began with'
    )


def _check_rates(log, again, count):
  differ = np.asarray(log.learning_rate != again.learning_rate[: len(log.learning_rate)])[:count]
  if differ.any():
    step = int(differ.argmax())
    raise ValueError(
      f'step {step} of the log had learning rate {float(log.learning_rate[step])}, this optimizer '
      f'has {float(again.learning_rate[step])}; make it with the learning rate of the run'
    )
