"""`lomo-optim` 0.1.1 (OpenLMLab/LOMO).

The package updates inside the backward pass; its arithmetic is here, for whole trees of gradients
and for layers alike.
"""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from memjax import transforms
from memjax.compat.pasted import only_default
from memjax.transforms.float32 import in_float32


def lomo(
  lr: optax.ScalarOrSchedule = 1e-3,
  clip_grad_norm: float | None = None,
  clip_grad_value: float | None = None,
  weight_decay: float = 0.0,
  loss_scale_args: Mapping[str, float] = MappingProxyType({}),
) -> optax.GradientTransformationExtraArgs:
  """`lomo_optim.Lomo` 0.1.1: gradient descent without state.

  Reproduced, to 1e-6 in f32 on the same gradients:
    - The norm of `clip_grad_norm` is that of the gradients before `clip_grad_value`, which acts
      first, and 1e-6 is added to it.
    - Every leaf decays, norms too.

  Left out:
    - The scaling of f16 losses; and `model`, since a transform sees gradients only.
    - The crash when `clip_grad_norm` is set and the first of its two passes was not called: here
      the norm is that of the gradients given.

  Args:
    lr: Learning rate, or a schedule of the update count.
    clip_grad_norm: Largest norm of all gradients together.
    clip_grad_value: Largest magnitude of a gradient's entry.
    weight_decay: Decoupled decay.
    loss_scale_args: None but the package's default.

  Returns:
    A transform that yields updates to be added to the parameters.

  Raises:
    ValueError: for a `clip_grad_norm` that is not positive; for `loss_scale_args`.
  """
  only_default('loss_scale_args', dict(loss_scale_args), {}, 'bfloat16 needs no scaled losses')
  steps = optax.chain(
    _clip(clip_grad_norm, clip_grad_value),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(lr),
  )
  return in_float32(steps)


def adalomo(
  lr: optax.ScalarOrSchedule = 1e-3,
  loss_scale: float = 1024,
  eps: tuple[float, float] = (1e-30, 1e-3),
  clip_threshold: float = 1.0,
  decay_rate: float = -0.8,
  clip_grad_norm: float | None = None,
  clip_grad_value: float | None = None,
  weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """`lomo_optim.AdaLomo` 0.1.1.

  Reproduced, to 1e-6 in f32 on the same gradients:
    - The second moment's decay grows with the update's number, where the paper has a constant; it
      divides by the root, which the paper's formula lacks.
    - Weight decay is times the learning rate and the RMS of the weights, on every leaf.
    - Gradients are clipped as by `compat.lomo`, before the statistics.

  Left out:
    - `model`.
    - Leaves with more than two axes, which the package cannot hold: a stack is its matrices here.

  Args:
    lr: Learning rate, or a schedule of the update count, relative to the weights.
    loss_scale: Changes nothing: the package multiplies it in and divides it out again.
    eps: Added to the squared gradient; smallest RMS that weights count with.
    clip_threshold: Largest RMS of a matrix's update before it is scaled.
    decay_rate: Power of the update's number in the decay.
    clip_grad_norm: Largest norm of all gradients together.
    clip_grad_value: Largest magnitude of a gradient's entry.
    weight_decay: Decoupled decay.

  Returns:
    A transform that needs `params`.

  Raises:
    ValueError: for a `clip_grad_norm` that is not positive.
  """
  del loss_scale
  rule = transforms.adalomo(
    lr,
    decay_rate=-decay_rate,
    clipping_threshold=clip_threshold,
    eps=eps[0],
    parameter_floor=eps[1],
    weight_decay=weight_decay,
  )
  return in_float32(optax.chain(_clip(clip_grad_norm, clip_grad_value), rule))


def _clip(largest_norm, largest_value):
  if largest_norm is not None and largest_norm <= 0:
    raise ValueError(f'clip_grad_norm must be positive, got {largest_norm}')

  def clip(updates, params=None):
    del params
    factor = 1.0
    if largest_norm is not None:
      factor = jnp.minimum(1.0, largest_norm / (optax.tree.norm(updates) + 1e-6))
    if largest_value is not None:
      updates = jax.tree.map(lambda g: jnp.clip(g, -largest_value, largest_value), updates)
    return jax.tree.map(lambda g: g * factor, updates)

  return optax.stateless(clip)
