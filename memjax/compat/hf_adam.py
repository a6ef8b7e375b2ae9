"""Adam as Hugging Face Transformers 4 had it, which several packages copied."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms.bias import bias


def scale_by_hf_adam(
  b1, b2, eps, correct_bias=True, correct_eps=False
) -> optax.GradientTransformation:
  """`m / (sqrt(v) + eps)`, times `sqrt(1 - b2^k) / (1 - b1^k)` if `correct_bias`.

  With `correct_eps` it is PyTorch's and optax's Adam: `eps` counts after the correction.
  """

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=zeros(), nu=zeros())

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
    step = _step(b1, b2, count) if correct_bias else 1.0
    least = eps * jnp.sqrt(bias(b2, count)) if correct_eps else eps
    updates = jax.tree.map(lambda m, v: step * (m / (jnp.sqrt(v) + least)), mu, nu)
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)


def scale_by_hf_bias(b1, b2) -> optax.GradientTransformation:
  """The factor of `scale_by_hf_adam`, for packages that put something between it and the rest."""

  def init(params):
    del params
    return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    step = _step(b1, b2, count)
    updates = jax.tree.map(lambda u: (step * u).astype(u.dtype), updates)
    return updates, optax.ScaleByScheduleState(count=count)

  return optax.GradientTransformation(init, update)


def _step(b1, b2, count):
  return jnp.sqrt(bias(b2, count)) / bias(b1, count)


class DecayUpdatedState(NamedTuple):
  """State of the decay that acts on updated weights."""

  count: jax.Array  # i32[], updates seen so far; the schedule's argument.


def decay_updated(lr, weight_decay) -> optax.GradientTransformation:
  """Decays `p + u`, the weight that the update would give, by `lr * weight_decay`."""
  if isinstance(weight_decay, int | float) and weight_decay == 0:
    return optax.identity()

  def init(params):
    del params
    return DecayUpdatedState(jnp.zeros([], jnp.int32))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('weight_decay acts on the weights: call update(updates, state, params)')
    decay = weight_decay * (lr(state.count) if callable(lr) else lr)
    updates = jax.tree.map(lambda u, p: u - (decay * (p + u)).astype(u.dtype), updates, params)
    return updates, DecayUpdatedState(optax.safe_increment(state.count))

  return optax.GradientTransformation(init, update)
