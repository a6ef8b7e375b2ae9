"""Learning rates as functions of the count of finished updates, from 0.

All begin with a linear warm-up from zero, so the first update moves nothing while moments, counts
and bases advance, as in the published recipes.
"""

import jax.numpy as jnp
import optax


def cosine(peak, *, steps: int, warmup_steps: int, final_ratio: float = 0.1) -> optax.Schedule:
  """Linear warm-up, then half a cosine from `peak` down to `final_ratio * peak` at `steps`.

  >>> multiplier = cosine(1.0, steps=10_000, warmup_steps=1_000)
  >>> [round(float(multiplier(t)), 6) for t in (0, 500, 1_000, 5_500, 10_000)]
  [0.0, 0.5, 1.0, 0.55, 0.1]

  Reference: Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983
  """

  def decay(done):
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * done))

  return _warm_up(peak, decay, steps, warmup_steps)


def linear(peak, *, steps: int, warmup_steps: int, final_ratio: float = 0.0) -> optax.Schedule:
  """Linear warm-up, then a straight line from `peak` down to `final_ratio * peak` at `steps`."""
  return _warm_up(peak, lambda done: 1 - (1 - final_ratio) * done, steps, warmup_steps)


def constant(peak, *, steps: int, warmup_steps: int, final_ratio: float = 1.0) -> optax.Schedule:
  """Linear warm-up, then `peak` for ever; `final_ratio` is 1 by nature and is not read."""
  del final_ratio
  return _warm_up(peak, jnp.ones_like, steps, warmup_steps)


def _warm_up(peak, decay, steps, warmup_steps):
  if not 0 <= warmup_steps < steps:
    raise ValueError(f'warmup_steps {warmup_steps} is not below steps {steps}, and at least 0')

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    rising = count / max(warmup_steps, 1)
    done = jnp.clip((count - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
    return peak * jnp.where(count < warmup_steps, rising, decay(done))

  return schedule


SCHEDULES = {'constant': constant, 'cosine': cosine, 'linear': linear}
