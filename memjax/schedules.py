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


def jagged(
  peak,
  *,
  steps: int,
  warmup_steps: int,
  restart_every: int,
  restart_warmup: int = 100,
  final_ratio: float = 0.1,
  adjust_step: int = 0,
  official: bool = False,
) -> optax.Schedule:
  """A cosine that begins again from zero at every restart, and climbs back to where it would be.

  For methods that restart: the first updates after one are small, while new moments settle.

  >>> multiplier = jagged(1.0, steps=20_000, warmup_steps=500, restart_every=5_000)
  >>> [round(float(multiplier(t)), 5) for t in (500, 4_999, 5_000, 5_050, 5_100)]
  [1.0, 0.88688, 0.0, 0.44099, 0.88198]

  Args:
    peak: Learning rate after the first warm-up.
    steps: Updates in all.
    warmup_steps: Of the first warm-up.
    restart_every: Updates between restarts.
    restart_warmup: Updates of each later warm-up.
    final_ratio: Of the peak, at the end.
    adjust_step: Updates that a warm-started run has behind it: all of the curve but the first
      warm-up is so much further.
    official: As the official code has it, the first restart is not warmed up again when it comes
      before `restart_every` updates, which `adjust_step` makes it do.

  Raises:
    ValueError: for lengths that contradict each other.

  References:
    Lialin et al., `ReLoRA <https://arxiv.org/abs/2307.05695>`_, 2023, section 3
  """
  _check_restarts(steps, warmup_steps, restart_every, restart_warmup, adjust_step)

  def curve(count):
    done = jnp.clip((count - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * done))

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    position = count + adjust_step
    since = position % restart_every
    top = curve(position - since + restart_warmup)
    restarted = (count if official else position) >= restart_every
    again = restarted & (since < restart_warmup)
    after = jnp.where(again, since / max(restart_warmup, 1) * top, curve(position))
    return peak * jnp.where(count < warmup_steps, count / max(warmup_steps, 1), after)

  return schedule


def cycles(
  peak,
  *,
  steps: int,
  warmup_steps: int,
  restart_every: int,
  final_ratio: float = 0.1,
  official: bool = False,
) -> optax.Schedule:
  """A warm-up and half a cosine in every `restart_every` updates, each like the first.

  >>> multiplier = cycles(1.0, steps=200, warmup_steps=10, restart_every=100)
  >>> [round(float(multiplier(t)), 2) for t in (0, 10, 55, 100, 105, 155)]
  [0.0, 1.0, 0.55, 0.0, 0.5, 0.55]

  Args:
    peak: Learning rate after a warm-up.
    steps: Updates in all; a multiple of `restart_every`.
    warmup_steps: Of each warm-up.
    restart_every: Updates of a cycle.
    final_ratio: Of the peak, at a cycle's end.
    official: The first two updates of later cycles have 1e-7 of the peak, as in the official code.

  Raises:
    ValueError: for lengths that contradict each other.
  """
  _check_restarts(steps, warmup_steps, restart_every, 0, 0)
  if steps % restart_every:
    raise ValueError(f'steps {steps} is not a multiple of restart_every {restart_every}')
  cycle = cosine(peak, steps=restart_every, warmup_steps=warmup_steps, final_ratio=final_ratio)

  def schedule(count):
    since = jnp.asarray(count, jnp.float32) % restart_every
    held = official & (since < 2) & (since < warmup_steps) & (count >= restart_every)
    return jnp.where(held, 1e-7 * peak, cycle(since))

  return schedule


def _check_restarts(steps, warmup_steps, restart_every, restart_warmup, adjust_step):
  if restart_every < 1:
    raise ValueError(
      f'restart_every is {restart_every}, but this schedule restarts: set it to the updates '
      'between restarts, as config.adapter.every'
    )
  if not 0 <= adjust_step + warmup_steps <= min(restart_every, steps - 1):
    raise ValueError(
      f'adjust_step {adjust_step} and warmup_steps {warmup_steps} are together more than '
      f'restart_every {restart_every}, or than steps {steps}'
    )
  if not 0 <= restart_warmup < restart_every:
    raise ValueError(f'restart_warmup {restart_warmup} is not below restart_every {restart_every}')


def _warm_up(peak, decay, steps, warmup_steps):
  if not 0 <= warmup_steps < steps:
    raise ValueError(f'warmup_steps {warmup_steps} is not below steps {steps}, and at least 0')

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    rising = count / max(warmup_steps, 1)
    done = jnp.clip((count - warmup_steps) / (steps - warmup_steps), 0.0, 1.0)
    return peak * jnp.where(count < warmup_steps, rising, decay(done))

  return schedule


SCHEDULES = {
  'constant': constant,
  'cosine': cosine,
  'cycles': cycles,
  'jagged': jagged,
  'linear': linear,
}
