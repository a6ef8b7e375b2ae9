"""The ordinary training step: one gradient tree, one transform, one addition.

Training state is a plain dict: `step` i32[] counts finished updates, `params` is a nested dict of
arrays, `opt` the state of the optax transform. A batch is a dict of `[B, T]` arrays `tokens`,
`targets`, `weights`.
"""

import jax
import jax.numpy as jnp
import optax

from memjax import transforms


def init_state(init_params, transform: optax.GradientTransformation, key):
  """Returns the state before the first update; trace it under `jit` to place it as it is made.

  Args:
    init_params: Function of a key that returns the parameters.
    transform: Transform whose state is initialised on them.
    key: PRNG key of the parameters.
  """
  params = init_params(key)
  return {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt': transform.init(params)}


def make_train_step(
  loss,
  transform: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  clip_norm: float | None = None,
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
    clip_norm: Largest global norm of the gradient, before the transform; None does not clip.
    rounding_key: Root key of the stochastic rounding of 16-bit parameters; None rounds to nearest.
  """

  def step(state, batch):
    total, grads = _value_and_grad(loss, state['params'], batch, accumulate)
    norm = global_norm(grads)
    if clip_norm is not None:
      grads = _scale(grads, jnp.minimum(1.0, clip_norm / norm))
    updates, opt = transform.update(grads, state['opt'], state['params'])
    key = None if rounding_key is None else jax.random.fold_in(rounding_key, state['step'])
    params = transforms.apply_updates(state['params'], updates, key)
    metrics = {'train/loss': total, 'train/grad_norm': norm}
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, metrics

  return step


def global_norm(tree):
  """Returns the Euclidean norm of all leaves together, summed in f32 whatever their dtype."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def _value_and_grad(loss, params, batch, accumulate):
  """Mean loss over the tokens of the batch, and its gradient."""
  count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)

  def share(params, part):
    return loss(params, part)[0] / count

  if accumulate == 1:
    return jax.value_and_grad(share)(params, batch)

  def add(total, part):
    value, grads = jax.value_and_grad(share)(params, part)
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (value, grads)), None

  zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
  total, _ = jax.lax.scan(add, (jnp.float32(0), zeros), _split(batch, accumulate))
  return total


def _split(batch, parts):
  """Rows `i::parts` form micro-batch `i`: every device keeps its own rows, nothing moves."""
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
  )


def _scale(tree, factor):
  return jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree)
