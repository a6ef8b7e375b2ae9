"""The ordinary training step: one gradient tree, one transform, one addition.

Training state is a plain dict: `step` i32[] counts finished updates, `params` is a nested dict of
arrays, `opt` the state of the optax transform. A batch is a dict of `[B, T]` arrays `tokens`,
`targets`, `weights`.
"""

import jax
import jax.numpy as jnp
import optax

from memjax import transforms, weights
from memjax.steps import clipping, micro_batches
from memjax.steps.slices import STACK


def init_state(init_params, transform: optax.GradientTransformation, key):
  """Returns the state before the first update; trace it under `jit` to place it as it is made.

  Args:
    init_params: Function of a key that returns the parameters.
    transform: Transform whose state is initialised on them.
    key: PRNG key of the parameters.
  """
  params = init_params(key)
  opt = transform.init(weights.dense(params))
  return {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt': opt}


def make_train_step(
  loss,
  transform: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  clip_norm: float | None = None,
  clip_by: str = 'global',
  rounding_key=None,
):
  """Returns `step(state, batch) -> (state, metrics)`, a pure function to be jitted with its state
  donated.

  The loss is the sum over tokens divided by their count, both over all micro-batches, so that a
  micro-batch counts by its tokens. Memory: one gradient tree in the parameters' dtype; with
  `accumulate > 1` one more, in f32, which the transform receives.

  Args:
    loss: `loss(params, batch) -> (sum f32[], count f32[])`.
    transform: Any optax transform; extra arguments it may ask for are not given.
    accumulate: Micro-batches a batch is cut into; divides `B`.
    clip_norm: Largest norm of the gradient, before the transform; None does not clip.
    clip_by: `'global'` clips by the norm of all gradients together; `'layer'` clips each layer of
      `params['blocks']`, and each of the other groups of parameters, by its own norm.
    rounding_key: Root key of the stochastic rounding of 16-bit parameters; None rounds to nearest.

  Raises:
    ValueError: for another `clip_by`.
  """
  clipping.check(clip_by)

  def step(state, batch):
    dense = weights.dense(state['params'])
    total, grads = _value_and_grad(loss, dense, batch, accumulate)
    norm = global_norm(grads)
    if clip_norm is not None and clip_by == 'global':
      grads = clipping.by_norm(grads, norm, clip_norm)
    elif clip_norm is not None:
      grads = clipping.by_group(grads, clip_norm, stack=STACK)
    updates, opt = transform.update(grads, state['opt'], dense)
    key = None if rounding_key is None else jax.random.fold_in(rounding_key, state['step'])
    params = transforms.apply_updates(state['params'], updates, key)
    metrics = {'train/loss': total, 'train/grad_norm': norm}
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, metrics

  return step


def global_norm(tree):
  """Returns the Euclidean norm of all leaves together, summed in f32 whatever their dtype."""
  return jnp.sqrt(clipping.square(tree))


def _value_and_grad(loss, params, batch, accumulate):
  """Mean loss over the tokens of the batch, and its gradient."""
  count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)

  def share(params, part):
    return loss(params, part)[0] / count

  def one(part):
    return jax.value_and_grad(share)(params, part), None

  return micro_batches.accumulate(one, micro_batches.split(batch, accumulate), accumulate)[0]
