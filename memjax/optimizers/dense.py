"""Optimizers that keep whole moments, or none."""

import optax

from memjax.optimizers.masks import decays, is_target
from memjax.transforms.float32 import in_float32


def adamw(learning_rate, scale=1.0, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
  """Adam with decoupled weight decay on matrices (Loshchilov and Hutter, 2019).

  `scale` multiplies the updates of the layers' matrices, the leaves that `galore` projects by
  default: with less than 1 the embedding and the head learn faster than the layers.
  """
  steps = optax.chain(
    optax.scale_by_adam(b1, b2, eps),
    *([] if scale == 1.0 else [optax.masked(optax.scale(scale), is_target)]),
    optax.add_decayed_weights(weight_decay, decays),
    optax.scale_by_learning_rate(learning_rate),
  )
  return in_float32(steps)


def sgd(learning_rate, momentum=0.0):
  """Gradient descent, with momentum if it is above zero."""
  return in_float32(optax.sgd(learning_rate, momentum=momentum or None))
