"""Gradients by backpropagation for the last layers, estimates from forward passes for the rest.

Shapes in this file: `L` layers, of which the last `k` are trained exactly; hidden states are `[B,
T, D]`. Parameters are in two trees, `{'estimated': ..., 'exact': ...}`, each with stacked `blocks`
of its own: the embedding and `[L - k, ...]` layers in one, `[k, ...]` layers and what only the head
reads in the other. A tied embedding is estimated.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax import transforms, weights
from memjax.estimators.estimator import find
from memjax.steps import diagnostics, zeroth_order
from memjax.steps.backward import EMBED
from memjax.steps.slices import STACK
from memjax.steps.whole_tree import global_norm

State = dict[str, Any]


def split(params: dict, last: int) -> dict:
  """Returns parameters in two trees, of which `exact` has the last `k` layers; copies them.

  Raises:
    ValueError: unless both trees have layers.
  """
  layers = jax.tree.leaves(params[STACK])[0].shape[0]
  if not 0 < last < layers:
    raise ValueError(
      f'hybrid.layers is {last}, but of {layers} layers at least one is estimated and one is not; '
      f"take 1 to {layers - 1}, or step='zeroth_order' or 'whole_tree'"
    )
  cut = lambda rows: jax.tree.map(lambda x: x[rows], params[STACK])
  rest = {k: v for k, v in params.items() if k not in (STACK, EMBED)}
  low = {EMBED: params[EMBED], STACK: cut(slice(None, layers - last))}
  return {'estimated': low, 'exact': {STACK: cut(slice(layers - last, None)), **rest}}


def join(params: dict) -> dict:
  """Returns parameters in one tree, as models take them; the opposite of `split`."""
  low, high = params['estimated'], params['exact']
  stack = jax.tree.map(lambda *parts: jnp.concatenate(parts), low[STACK], high[STACK])
  return {**high, **low, STACK: stack}


def init_state(init_params, last: int, estimator, transform, key: jax.Array) -> State:
  """Returns the training state before the first update.

  Args:
    init_params: Function of a key that returns the parameters, in one tree.
    last: Layers that are trained exactly.
    estimator: Chain with an estimator, see `memjax.steps.zeroth_order.make_train_step`.
    transform: Any optax transform, of the exact gradients.
    key: PRNG key of the parameters.
  """
  params = split(init_params(key), last)
  trained = weights.trained(params)
  opt = {
    'estimated': estimator.init(trained['estimated']),
    'exact': transform.init(trained['exact']),
  }
  return {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt': opt}


def make_loss(model: Any):
  """Returns `loss(params, batch) -> (sum, count)` of parameters in two trees."""

  def loss(params, batch):
    low, high = params['estimated'], params['exact']
    return _above(model, low, high, _below(model, low, batch), batch)

  return loss


def make_train_step(model: Any, estimator, transform, *, rounding_key=None, shardings=None):
  """Returns `step(state, batch) -> (state, metrics)`, to be jitted with its state donated.

  One forward pass with a backward pass through the last `k` layers, then the estimator's, through
  all: three forward passes with two-sided differences. Both kinds of update are made at the
  parameters of the same moment. Memory: that of `zeroth_order` for the first `L - k` layers, and of
  `whole_tree` for a model of `k` layers.

  A loss or gradient that is not finite skips the whole update, and is counted as in `zeroth_order`.
  Metrics are those of `zeroth_order`, `zo/update_ulps` of what is estimated, and
  `train/grad_norm`; `train/loss` is the value at the parameters.

  Args:
    model: Has `embed`, `blocks`, `head_loss` and `tied`, as `memjax.models.Llama`.
    estimator: As `init_state`, made with `form='weights'`.
    transform: As `init_state`.
    rounding_key: Root key of the stochastic rounding of 16-bit parameters; None rounds to nearest.
    shardings: `NamedSharding`s of the training state; None leaves it to the compiler.
  """
  transform = optax.with_extra_args_support(transform)
  where = shardings and {k: shardings[k]['estimated'] for k in ('params', 'opt')}
  advance = zeroth_order.make_apply(estimator, rounding_key, where)

  def step(state, batch):
    count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)
    low, high = state['params']['estimated'], state['params']['exact']
    trained = weights.trained(state['params'])
    x = _below(model, low, batch)

    def share(values):
      return _above(model, low, weights.replaced(high, values), x, batch)[0] / count

    value, grads = jax.value_and_grad(share)(trained['exact'])
    norm = global_norm(grads)
    sound = jnp.isfinite(value) & jnp.isfinite(norm)

    def value_fn(values):
      seen = weights.replaced(low, values)
      found = _above(model, seen, high, _below(model, seen, batch), batch)[0] / count
      return jnp.where(sound, found, jnp.nan)  # So that neither half is updated.

    # Forward passes begin when the activations kept for the backward pass are gone.
    estimated = {'step': state['step'], 'params': trained['estimated']}
    estimated['opt'], grads = lax.optimization_barrier((state['opt']['estimated'], grads))
    opt = zeroth_order.measure(estimator, estimated, value_fn=value_fn)
    rows, opt = diagnostics.after(diagnostics.first_rows(trained['estimated']), opt)
    estimated = advance({**estimated, 'opt': opt})
    found = find(estimated['opt'])

    def descend(exact):
      params, opt = exact
      updates, opt = transform.update(grads, opt, params)
      key = None if rounding_key is None else jax.random.fold_in(rounding_key, state['step'])
      return transforms.apply_updates(params, updates, key), opt

    exact = (trained['exact'], state['opt']['exact'])
    times = jnp.where(found.skips(), 0, 1)
    params, opt = lax.fori_loop(0, times, lambda _, exact: descend(exact), exact)
    metrics = {
      'train/loss': value,
      'train/grad_norm': norm,
      **diagnostics.slope_metrics(found),
      'zo/update_ulps': diagnostics.update_ulps(rows, diagnostics.first_rows(estimated['params'])),
    }
    new = {'estimated': estimated['params'], 'exact': params}
    opt = {'estimated': estimated['opt'], 'exact': opt}
    params = weights.replaced(state['params'], new)
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, metrics

  return step


def _below(model, low, batch):
  """Hidden states after the estimated layers."""
  return model.blocks(low[STACK], model.embed(low, batch['tokens']))


def _above(model, low, high, x, batch):
  """Summed loss and count of tokens, of hidden states after the estimated layers."""
  head = {k: v for k, v in high.items() if k != STACK}
  head |= {EMBED: low[EMBED]} if model.tied else {}
  x = model.blocks(high[STACK], x)
  return model.head_loss(head, x, batch['targets'], batch['weights'])
