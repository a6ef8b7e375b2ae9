"""The ordinary training step: one gradient tree, one transform, one addition.

Training state is a plain dict: `step` i32[] counts finished updates, `params` is a nested dict of
arrays, `opt` the state of the optax transform. A batch is a dict of `[B, T]` arrays `tokens`,
`targets`, `weights`.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from memjax import transforms, weights
from memjax.steps import clipping, micro_batches
from memjax.steps.slices import STACK

ACCUMULATIONS = ('weights', 'subspace')


def init_state(init_params, transform: optax.GradientTransformation, key):
  """Returns the state before the first update; trace it under `jit` to place it as it is made.

  Args:
    init_params: Function of a key that returns the parameters.
    transform: Transform whose state is initialised on them.
    key: PRNG key of the parameters.
  """
  params = init_params(key)
  opt = transform.init(weights.dense(weights.trained(params)))
  return {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt': opt}


def make_train_step(
  loss,
  transform: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  clip_norm: float | None = None,
  clip_by: str = 'global',
  accumulate_in: str = 'weights',
  rounding_key=None,
):
  """Returns `step(state, batch) -> (state, metrics)`, a pure function to be jitted with its state
  donated.

  The loss is the sum over tokens divided by their count, both over all micro-batches, so that a
  micro-batch counts by its tokens. Memory: one gradient tree in the parameters' dtype; with
  `accumulate > 1` one more, in f32, which the transform receives, or that of its projection.

  Args:
    loss: `loss(params, batch) -> (sum f32[], count f32[])`.
    transform: Any optax transform; extra arguments it may ask for are not given.
    accumulate: Micro-batches a batch is cut into; divides `B`.
    clip_norm: Largest norm of the gradient, before the transform; None does not clip.
    clip_by: `'global'` clips by the norm of all gradients together; `'layer'` clips each layer of
      `params['blocks']`, and each of the other groups of parameters, by its own norm.
    accumulate_in: `'weights'` adds up gradients of micro-batches as they are. `'subspace'` adds up
      their projections, `[r, n]` numbers a matrix, for transforms made with `project`; bases then
      come from the first micro-batch alone, and `train/grad_norm` is that of the projections.
    rounding_key: Root key of the stochastic rounding of 16-bit parameters; None rounds to nearest.

  Raises:
    ValueError: for another `clip_by` or `accumulate_in`, and for clipping in the subspace.
  """
  clipping.check(clip_by)
  check_accumulation(accumulate_in, clip_norm)
  in_subspace = accumulate_in == 'subspace'
  differentiate = functools.partial(_in_subspace, transform) if in_subspace else _of_weights
  extra_args = {'projected': True} if in_subspace else {}

  def step(state, batch):
    trained = weights.trained(state['params'])
    dense = weights.dense(trained)

    def loss_of(values, part, index):
      params = weights.in_part(state['params'], index)
      return loss(weights.replaced(params, values), part)

    total, grads, opt = differentiate(loss_of)(dense, state['opt'], batch, accumulate)
    norm = global_norm(grads)
    if clip_norm is not None and clip_by == 'global':
      grads = clipping.by_norm(grads, norm, clip_norm)
    elif clip_norm is not None:
      grads = clipping.by_group(grads, clip_norm, stack=STACK)
    updates, opt = transform.update(grads, opt, dense, **extra_args)
    key = None if rounding_key is None else jax.random.fold_in(rounding_key, state['step'])
    trained = transforms.apply_updates(trained, updates, key)
    params = weights.replaced(state['params'], trained)
    metrics = {'train/loss': total, 'train/grad_norm': norm}
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, metrics

  return step


def global_norm(tree):
  """Returns the Euclidean norm of all leaves together, summed in f32 whatever their dtype."""
  return jnp.sqrt(clipping.square(tree))


def check_accumulation(accumulate_in: str, clip_norm: float | None) -> None:
  """Raises a `ValueError` for a way to accumulate that does not exist, or not with clipping."""
  if accumulate_in not in ACCUMULATIONS:
    known = ' or '.join(map(repr, ACCUMULATIONS))
    raise ValueError(f'accumulate_in must be {known}; got {accumulate_in!r}')
  if accumulate_in == 'subspace' and clip_norm:
    raise ValueError(
      f'clip_norm={clip_norm} needs the norm of the whole gradient, of which '
      "accumulate_in='subspace' keeps the projection alone; set clip_norm=0"
    )


def _of_weights(loss):
  """Mean loss over the tokens of a batch, and its gradient."""

  def value_and_grad(params, opt, batch, accumulate):
    share = jax.value_and_grad(_share(loss, batch))
    one = lambda part, index: (share(params, part, index), None)
    parts = micro_batches.split(batch, accumulate)
    total, grads = micro_batches.accumulate(one, parts, accumulate)[0]
    return total, grads, opt

  return value_and_grad


def _in_subspace(transform, loss):
  """The same, the gradient projected; and the state, with bases that were due."""

  def value_and_grad(params, opt, batch, accumulate):
    parts = micro_batches.split(batch, accumulate)
    parts = parts if accumulate > 1 else jax.tree.map(lambda x: x[None], parts)

    def add(carry, indexed):
      total, summed, opt = carry
      index, part = indexed
      value, grads = jax.value_and_grad(_share(loss, batch))(params, part, index)
      opt = transforms.refresh_subspace(transform, grads, opt, params, when=index == 0)
      reduced = transforms.project_gradient(grads, opt)
      return (total + value, jax.tree.map(jnp.add, summed, reduced), opt), None

    reduced = jax.eval_shape(transforms.project_gradient, params, opt)
    zeros = jax.tree.map(jnp.zeros_like, reduced)
    start = jnp.zeros((), jnp.float32), zeros, opt
    return jax.lax.scan(add, start, (jnp.arange(accumulate), parts))[0]

  return value_and_grad


def _share(loss, batch):
  """A micro-batch's share of the mean loss over all tokens of the batch."""
  count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)
  return lambda params, part, index: loss(params, part, index)[0] / count
