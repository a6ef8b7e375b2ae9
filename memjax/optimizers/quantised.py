"""Optimizers whose moments are kept in 8 or 4 bits."""

import optax

from memjax import transforms
from memjax.optimizers.low_rank import BASES
from memjax.optimizers.masks import decays


def adamw8bit(
  learning_rate,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  kind='dynamic',
  block_size=256,
  min_size=4096,
  *,
  layout=None,
):
  """AdamW with 8-bit moments (Dettmers et al., 2022), 2.03 bytes a parameter; see
  `memjax.quantize_state`.
  """
  inner = optax.scale_by_adam(b1, b2, eps)
  moments = transforms.quantize_state(inner, 8, kind, block_size, min_size=min_size, layout=layout)
  return _decayed(moments, learning_rate, weight_decay)


def adam4bit(
  learning_rate,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  kind='dynamic',
  block_size=128,
  min_size=4096,
  *,
  layout=None,
):
  """AdamW with 4-bit moments (Li et al., 2023), 1.06 bytes a parameter."""
  inner = optax.scale_by_adam(b1, b2, eps)
  moments = transforms.quantize_state(inner, 4, kind, block_size, min_size=min_size, layout=layout)
  return _decayed(moments, learning_rate, weight_decay)


def lion8bit(
  learning_rate,
  b1=0.9,
  b2=0.99,
  weight_decay=0.0,
  kind='dynamic',
  block_size=256,
  min_size=4096,
  *,
  layout=None,
):
  """Lion (Chen et al., 2023) with its moment in 8 bits, 1.02 bytes a parameter."""
  inner = optax.scale_by_lion(b1, b2)
  moments = transforms.quantize_state(inner, 8, kind, block_size, min_size=min_size, layout=layout)
  return _decayed(moments, learning_rate, weight_decay)


def galore8bit(
  learning_rate,
  rank=128,
  refresh_every=200,
  scale=0.25,
  side='short',
  basis='subspace_iteration',
  stagger=True,
  b1=0.9,
  b2=0.999,
  eps=1e-8,
  weight_decay=0.0,
  kind='dynamic',
  block_size=256,
  min_size=4096,
  targets='',
  *,
  layout=None,
):
  """GaLore with 8-bit moments (Zhao et al., 2024); bases stay f32. See `memjax.galore`."""
  if basis not in BASES:
    raise ValueError(f'basis {basis!r} does not exist; there are {", ".join(BASES)}')
  inner = optax.scale_by_adam(b1, b2, eps)
  projected = transforms.project(
    transforms.quantize_state(inner, 8, kind, block_size, min_size=min_size, layout=layout),
    rank,
    side=side,
    refresh_every=refresh_every,
    basis=BASES[basis](),
    scale=scale,
    stagger=stagger,
    targets=targets or transforms.default_targets,
    layout=layout,
  )
  return _decayed(projected, learning_rate, weight_decay)


def _decayed(scaled, learning_rate, weight_decay):
  return optax.chain(
    scaled,
    optax.add_decayed_weights(weight_decay, decays),
    optax.scale_by_learning_rate(learning_rate),
  )
