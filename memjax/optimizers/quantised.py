"""Optimizers whose moments are kept in 8 or 4 bits."""

import optax

from memjax import transforms
from memjax.optimizers.low_rank import basis_of
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
  moments = _adam(8, b1, b2, eps, kind, block_size, min_size, layout)
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
  moments = _adam(4, b1, b2, eps, kind, block_size, min_size, layout)
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
  basis_bits=32,
  targets='',
  *,
  layout=None,
):
  """GaLore with 8-bit moments (Zhao et al., 2024); see `memjax.galore`. `basis_bits` are 32, 8 or
  4.
  """
  projected = transforms.project(
    _adam(8, b1, b2, eps, kind, block_size, min_size, layout),
    rank,
    side=side,
    refresh_every=refresh_every,
    basis=basis_of(basis),
    scale=scale,
    stagger=stagger,
    targets=targets or transforms.default_targets,
    layout=layout,
    storage=None if basis_bits == 32 else transforms.packed(basis_bits),
  )
  return _decayed(projected, learning_rate, weight_decay)


def q_galore8bit(
  learning_rate,
  rank=128,
  refresh_every=200,
  bits=4,
  threshold=0.4,
  growth=2.0,
  history=5,
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
  """Q-GaLore with 8-bit moments, as published (Zhang et al., 2024); see `memjax.q_galore`."""
  return transforms.q_galore(
    learning_rate,
    rank,
    inner=_adam(8, b1, b2, eps, kind, block_size, min_size, layout),
    refresh_every=refresh_every,
    interval=transforms.lazy(threshold, growth, history),
    storage=transforms.packed(bits),
    basis=basis_of(basis),
    scale=scale,
    side=side,
    stagger=stagger,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )


def apollo_mini8bit(
  learning_rate,
  refresh_every=200,
  scale=128**0.5,
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
  """APOLLO-Mini (Zhu et al., 2024), moments of embedding and head in 8 bits: they are nearly all
  the state there is. See `memjax.apollo_mini`.
  """
  return transforms.apollo_mini(
    learning_rate,
    inner=_adam(8, b1, b2, eps, kind, block_size, min_size, layout),
    refresh_every=refresh_every,
    scale=scale,
    weight_decay=weight_decay,
    mask=decays,
    targets=targets or None,
    layout=layout,
  )


def _adam(bits, b1, b2, eps, kind, block_size, min_size, layout):
  inner = optax.scale_by_adam(b1, b2, eps)
  return transforms.quantize_state(inner, bits, kind, block_size, min_size=min_size, layout=layout)


def _decayed(scaled, learning_rate, weight_decay):
  return optax.chain(
    scaled,
    optax.add_decayed_weights(weight_decay, decays),
    optax.scale_by_learning_rate(learning_rate),
  )
