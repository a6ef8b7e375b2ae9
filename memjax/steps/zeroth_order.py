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
import optax
from jax import lax

from memjax import transforms, weights
from memjax.estimators.estimator import find
from memjax.estimators.log import observed
from memjax.steps import diagnostics, held, slices
from memjax.steps.layerwise import make_advance, shardings_of
from memjax.steps.slices import STACK


def make_train_step(
  loss,
  transform: optax.GradientTransformation,
  *,
  rounding_key=None,
  shardings=None,
  halves: jax.sharding.NamedSharding | None = None,
):
  """Returns `step(state, batch) -> (state, metrics)`, to be jitted with its state donated.

  Memory beside parameters and optimizer state: that of a forward pass; the noise of one matrix; the
  estimate of one layer, and of the embedding and the head, which the compiler fuses into what uses
  them where the noise is dense. Communicates, under a data-parallel mesh, the sum of losses of each
  forward pass and the count of tokens: four bytes each.

  A step with a loss that is not finite leaves parameters and optimizer as they were, and is
  counted; the next draws other noise. `train/loss` is then NaN.

  Metrics beside `train/loss`, the mean over the forward passes: those of
  `memjax.steps.diagnostics.slope_metrics`, and `zo/update_ulps`, root mean square change of the
  weights over their unit in the last place, in the first row of each leaf.

  Args:
    loss: `loss(params, batch) -> (sum f32[], count f32[])`, which asks its leaves through
      `memjax.weights`.
    transform: An optax chain with one estimator, made with `form='weights'`. What follows it must
      update a leaf from that leaf alone, as in `memjax.steps.layerwise`.
    rounding_key: Root key of the stochastic rounding of 16-bit parameters; None rounds to nearest,
      which loses most updates, see `memjax.apply_updates`.
    shardings: `NamedSharding`s of the training state; None leaves it to the compiler.
    halves: Sharding of two numbers over a mesh axis of size two, `NamedSharding(mesh, P('sides'))`:
      the values on both sides are taken at once, each by a half of the mesh, over whose other axes
      batch and parameters may be sharded. Halves send each other the values and nothing else. None
      has the whole mesh take one after the other.

  References:
    Wang et al., `DistZO2: High-Throughput and Memory-Efficient Zeroth-Order Fine-tuning LLMs with
    Distributed Parallel Computing <https://arxiv.org/abs/2507.03211>`_, 2025 (`halves`)
  """
  advance = make_apply(transform, rounding_key, shardings)

  def step(state, batch):
    count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)
    params, state = state['params'], {**state, 'params': weights.trained(state['params'])}
    value_fn = lambda trained: loss(weights.replaced(params, trained), batch)[0] / count
    opt = measure(transform, state, value_fn=value_fn, halves=halves)
    rows, opt = diagnostics.after(diagnostics.first_rows(state['params']), opt)
    state = advance({**state, 'opt': opt})
    found = find(state['opt'])
    metrics = {
      'train/loss': diagnostics.loss(found),
      **diagnostics.slope_metrics(found),
      'zo/update_ulps': diagnostics.update_ulps(rows, diagnostics.first_rows(state['params'])),
    }
    return {**state, 'params': weights.replaced(params, state['params'])}, metrics

  return step


def measure(transform, state, **how) -> Any:
  """Returns the optimizer state with the slopes of this step; nothing else has moved.

  Args:
    transform: Chain with an estimator.
    state: Training state.
    **how: `value_fn`, and `halves`; or `slopes` to take for measured.
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
    stacked = isinstance(params, dict) and isinstance(params.get(STACK), dict)
    # Blockwise, a layer's slope is one of many; leaves are then updated whole.
    if stacked and not blockwise:
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
