"""AdaLomo: Adafactor for updates that are applied while the gradient is computed.

Shapes in this file: a matrix leaf is `[..., m, n]`; leading axes are batch (scan-stacked layers,
experts), and every matrix has its own factors, its own clipping and its own scale.
"""

from typing import Any

import optax

from memjax.transforms.adafactor import scale_by_adafactor, scale_by_parameter_rms
from memjax.transforms.float32 import in_float32


def scale_by_adalomo(
  *,
  decay_rate: float = 0.8,
  clipping_threshold: float | None = 1.0,
  eps: float = 1e-30,
  parameter_floor: float = 1e-3,
) -> optax.GradientTransformation:
  """Rescales updates as Adafactor, every matrix factored and its step relative to its weights.

  The method's grouped update normalisation, one group a matrix, is Adafactor's clipping. Nothing
  here looks beyond one unit, so that a layer can be updated as soon as its gradient exists and the
  result is the same. A matrix keeps `m + n` f32 numbers, any other leaf one a number.

  Args:
    decay_rate: The power of the update's number in the decay.
    clipping_threshold: Largest RMS of a unit's update before it is scaled; None does not clip.
    eps: Added to the squared gradient.
    parameter_floor: Smallest RMS that weights count with.

  Returns:
    A transform that needs `params`.

  References:
    Lv et al., `AdaLomo: Low-memory Optimization with Adaptive Learning Rate
    <https://arxiv.org/abs/2310.10195>`_, 2023; the decay is that of the authors' code, which the
    paper leaves constant.
  """
  return optax.chain(
    _scale_by_factors(decay_rate, clipping_threshold, eps), scale_by_parameter_rms(parameter_floor)
  )


def adalomo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  decay_rate: float = 0.8,
  clipping_threshold: float | None = 1.0,
  eps: float = 1e-30,
  parameter_floor: float = 1e-3,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """AdaLomo with its weight decay, which is relative to the weights like the step.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> optimizer = adalomo(learning_rate=0.01)
    >>> loss = lambda params: jnp.mean(jnp.square(params['w']))
    >>> params = {'w': jnp.ones([16, 24])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(f'{loss(params):.3f}')
    0.980
    0.961
    0.942

  Args:
    learning_rate: A number or an optax schedule, relative to the size of the weights; published,
      5e-4 for instruction tuning and 1e-3 for further pre-training.
    decay_rate: As `scale_by_adalomo`.
    clipping_threshold: As `scale_by_adalomo`.
    eps: As `scale_by_adalomo`.
    parameter_floor: As `scale_by_adalomo`.
    weight_decay: Decoupled decay, times the learning rate and times the RMS of the weights.
    mask: Leaves to decay, as in `optax.adamw`.

  Returns:
    A transform that yields updates to be added to the parameters; it needs `params`.
  """
  steps = optax.chain(
    _scale_by_factors(decay_rate, clipping_threshold, eps),
    optax.add_decayed_weights(weight_decay, mask),
    scale_by_parameter_rms(parameter_floor),
    optax.scale_by_learning_rate(learning_rate),
  )
  return in_float32(steps)


def _scale_by_factors(decay_rate, clipping_threshold, eps):
  return scale_by_adafactor(
    decay_rate=decay_rate,
    min_dim_size_to_factor=1,
    clipping_threshold=clipping_threshold,
    eps=eps,
  )
