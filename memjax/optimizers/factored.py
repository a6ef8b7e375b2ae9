"""Optimizers whose second moment is factored into rows and columns."""

import optax

from memjax.optimizers.masks import decays
from memjax.transforms.float32 import in_float32


def adafactor(
  learning_rate,
  decay_rate=0.8,
  clipping_threshold=1.0,
  min_dim_size_to_factor=32,
  scale_by_parameter=True,
  weight_decay=0.0,
):
  """Adafactor as optax has it (Shazeer and Stern, 2018)."""
  inner = optax.adafactor(
    learning_rate,
    min_dim_size_to_factor=min_dim_size_to_factor,
    decay_rate=decay_rate,
    multiply_by_parameter_scale=scale_by_parameter,
    clipping_threshold=clipping_threshold,
    weight_decay_rate=weight_decay or None,
    weight_decay_mask=decays,
  )
  return in_float32(inner)
