"""Optimizers whose second moment is factored into rows and columns."""

from memjax import transforms
from memjax.optimizers.low_rank import basis_of
from memjax.optimizers.masks import decays


def adafactor(
  learning_rate,
  decay_rate=0.8,
  clipping_threshold=1.0,
  min_dim_size_to_factor=32,
  scale_by_parameter=True,
  momentum=0.0,
  weight_decay=0.0,
  relative_step=False,
):
  """Adafactor (Shazeer and Stern, 2018); see `memjax.adafactor`. No momentum if it is 0.

  `relative_step` multiplies the learning rate by the paper's, the inverse root of the update's
  number and 0.01 at most: a constant 1 then gives the paper's.
  """
  if relative_step:
    learning_rate = _times(learning_rate, transforms.relative_step())
  return transforms.adafactor(
    learning_rate,
    decay_rate=decay_rate,
    min_dim_size_to_factor=min_dim_size_to_factor,
    clipping_threshold=clipping_threshold,
    multiply_by_parameter_scale=scale_by_parameter,
    momentum=momentum or None,
    weight_decay=weight_decay,
    mask=decays,
  )


def _times(learning_rate, schedule):
  rate = learning_rate if callable(learning_rate) else lambda count: learning_rate
  return lambda count: rate(count) * schedule(count)


def came(
  learning_rate, b1=0.9, b2=0.999, b3=0.9999, clipping_threshold=1.0, eps=1e-30, weight_decay=0.0
):
  """CAME (Luo et al., 2023); see `memjax.came`. Warm the learning rate up."""
  return transforms.came(
    learning_rate,
    b1,
    b2,
    b3,
    eps=eps,
    clipping_threshold=clipping_threshold,
    weight_decay=weight_decay,
    mask=decays,
  )


def adalomo(learning_rate, decay_rate=0.8, clipping_threshold=1.0, weight_decay=0.0):
  """AdaLomo (Lv et al., 2023); see `memjax.adalomo`."""
  return transforms.adalomo(
    learning_rate,
    decay_rate=decay_rate,
    clipping_threshold=clipping_threshold,
    weight_decay=weight_decay,
    mask=decays,
  )


def sm3(learning_rate, momentum=0.0, eps=1e-30, weight_decay=0.0):
  """SM3 (Anil et al., 2019); see `memjax.sm3`. No momentum if it is 0."""
  return transforms.sm3(learning_rate, momentum, eps=eps, weight_decay=weight_decay, mask=decays)


def galore_adafactor(
  learning_rate,
  rank=128,
  refresh_every=200,
  scale=0.25,
  side='short',
  basis='subspace_iteration',
  stagger=True,
  decay_rate=0.8,
  clipping_threshold=1.0,
  momentum=0.0,
  weight_decay=0.0,
  targets='',
  *,
  layout=None,
):
  """Adafactor in GaLore's subspace (Zhao et al., 2024); see `memjax.galore_adafactor`. No momentum
  if it is 0; `targets` is a regex on leaf paths, '' the published choice.
  """
  return transforms.galore_adafactor(
    learning_rate,
    rank,
    decay_rate=decay_rate,
    clipping_threshold=clipping_threshold,
    momentum=momentum or None,
    side=side,
    refresh_every=refresh_every,
    basis=basis_of(basis),
    scale=scale,
    stagger=stagger,
    targets=targets or None,
    layout=layout,
    weight_decay=weight_decay,
    mask=decays,
  )
