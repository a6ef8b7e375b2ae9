"""`transformers.Adafactor` (Hugging Face Transformers 4 and 5, from fairseq)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms import units
from memjax.transforms.adafactor import scale_by_adafactor
from memjax.transforms.float32 import in_float32


def adafactor(
  lr: optax.ScalarOrSchedule | None = None,
  eps: tuple[float, float] = (1e-30, 1e-3),
  clip_threshold: float = 1.0,
  decay_rate: float = -0.8,
  beta1: float | None = None,
  weight_decay: float = 0.0,
  scale_parameter: bool = True,
  relative_step: bool = True,
  warmup_init: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """`transformers.Adafactor`, on Flax kernels `[..., in, out]`.

  Reproduced, to 1e-6 in f32 on the same gradients:
    - Every matrix is factored, whatever its size.
    - `beta1` averages updates that are already multiplied by the step size, so that a schedule
      acts late.
    - Weight decay acts before the step and on all leaves, times the whole step size, which
      `scale_parameter` makes relative to the weights.
    - `relative_step=True` is the default and refuses an `lr`.

  Left out:
    - Factors over the last two axes of a stack of norms `[L, n]`: here each is a vector, as it
      would be as a parameter of its own, and so is its step size.

  Args:
    lr: Learning rate, or a schedule of the update count; None with `relative_step`.
    eps: Added to the squared gradient; smallest RMS that weights count with.
    clip_threshold: Largest RMS of an update before it is scaled.
    decay_rate: Power of the update's number in the second moment's decay.
    beta1: Decay of the momentum; None has none.
    weight_decay: Decoupled decay, see above.
    scale_parameter: Whether the step is relative to the RMS of the weights.
    relative_step: Whether the step size is the inverse root of the update's number.
    warmup_init: Whether that starts at 1e-6, not 1e-2.

  Returns:
    A transform that needs `params`.

  Raises:
    ValueError: for an `lr` with `relative_step`, none without, or `warmup_init` without it.
  """
  return with_step_sizes(
    scaled_inside(eps[0], clip_threshold, decay_rate, beta1),
    step_sizes(lr, eps[1], scale_parameter, relative_step, warmup_init),
    weight_decay,
  )


def step_sizes(lr, floor, scale_parameter, relative_step, warmup_init):
  """Checks the package's arguments; returns its step sizes, one a unit, of (count, params)."""
  if lr is not None and relative_step:
    raise ValueError('lr and relative_step=True exclude each other; pass relative_step=False')
  if lr is None and not relative_step:
    raise ValueError('relative_step=False needs an lr')
  if warmup_init and not relative_step:
    raise ValueError('warmup_init=True is a warm-up of the relative step: pass relative_step=True')

  def rate(count):
    if not relative_step:
      return lr(count) if callable(lr) else lr
    t = (count + 1).astype(jnp.float32)
    return jnp.minimum(1e-6 * t if warmup_init else 1e-2, jax.lax.rsqrt(t))

  def sizes(count, params):
    scale = lambda path, p: jnp.maximum(floor, units.unit_rms(path, p)) if scale_parameter else 1.0
    return units.map_with_path(lambda path, p: rate(count) * scale(path, p), params)

  return sizes


def scaled_inside(eps, clip_threshold, decay_rate, beta1):
  """Adafactor whose momentum averages updates times their step sizes, an extra argument."""
  inner = scale_by_adafactor(
    decay_rate=-decay_rate, min_dim_size_to_factor=1, clipping_threshold=clip_threshold, eps=eps
  )
  momentum = optax.identity() if beta1 is None else optax.ema(beta1, debias=False)

  def init(params):
    return inner.init(params), momentum.init(params)

  def update(updates, state, params=None, *, sizes, **extra_args):
    del extra_args
    updates, inner_state = inner.update(updates, state[0], params)
    updates = jax.tree.map(lambda u, size: u * size, updates, sizes)
    updates, momentum_state = momentum.update(updates, state[1], params)
    return updates, (inner_state, momentum_state)

  return optax.GradientTransformationExtraArgs(init, update)


class StepSizesState(NamedTuple):
  """State of `with_step_sizes`."""

  count: jax.Array  # i32[], updates seen so far.
  inner: optax.OptState


def with_step_sizes(inner, sizes, weight_decay):
  """Runs `inner` with `sizes=sizes(count, params)`, then decays by them and descends."""

  def init(params):
    return StepSizesState(jnp.zeros([], jnp.int32), inner.init(params))

  def update(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError('step and decay look at the weights: call update(updates, state, params)')
    now = sizes(state.count, params)
    updates, inner_state = inner.update(updates, state.inner, params, sizes=now)
    descend = lambda u, p, size: -(weight_decay * size * p + u)
    updates = jax.tree.map(descend, updates, params, now)
    return updates, StepSizesState(optax.safe_increment(state.count), inner_state)

  return in_float32(optax.GradientTransformationExtraArgs(init, update))
