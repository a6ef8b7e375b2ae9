"""Optimizers whose moments are kept in 8 or 4 bits.

Each is a chain over `memjax.quantize_state`, which tells what is stored, in which blocks and on
which device; arguments that all share:

- `kind`: map from codes to numbers, `'dynamic'`, `'linear'` or `'fp8'` (8 bits only).
- `block_size`: numbers that share an f32 scale, at most.
- `min_size`: leaves with fewer numbers keep f32 moments.
- `weight_decay`: decoupled, times the learning rate, of weights and not of norms and biases.
- `layout`: `memjax.sharding.layout(...)` on a mesh, so that no block straddles devices.
"""

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
  """AdamW with 8-bit moments, 2.03 bytes a parameter in place of 8.

  >>> import jax.numpy as jnp
  >>> state = adamw8bit(1e-3).init({'w': jnp.ones((64, 256))})
  >>> state[0].inner.nu['w'].dtype, state[0].scales.nu['w'].shape
  (dtype('uint8'), (64, 1))

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022
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
  """AdamW with 4-bit moments, 1.06 bytes a parameter; two codes share a byte.

  >>> import jax.numpy as jnp
  >>> adam4bit(1e-3).init({'w': jnp.ones((64, 256))})[0].inner.mu['w'].shape
  (64, 128)

  References:
    Li et al., `Memory Efficient Optimizers with 4-bit States
    <https://arxiv.org/abs/2309.01507>`_, 2023
  """
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
  """Lion with its moment in 8 bits, 1.02 bytes a parameter.

  >>> import jax.numpy as jnp
  >>> lion8bit(1e-4).init({'w': jnp.ones((64, 256))})[0].inner.mu['w'].dtype
  dtype('uint8')

  References:
    Chen et al., `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`_, 2023
  """
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
  """GaLore with 8-bit moments in its subspaces; see `memjax.galore`.

  A matrix with sides `a <= c` takes `4 r a` bytes for the basis (`basis_bits` 8 or 4 take a quarter
  or an eighth) and `2.03 r c` for the moments.

  >>> import jax.numpy as jnp
  >>> state = galore8bit(1e-2, rank=32).init({'w': jnp.ones((64, 256))})
  >>> state[0].left['w'].shape, state[0].inner.inner.mu['w'].dtype
  ((64, 32), dtype('uint8'))

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024
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
  basis='random',
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
  """APOLLO-Mini (Zhu et al., 2024), moments of embedding and head in 8 bits: they are nearly all
  the state there is. See `memjax.apollo_mini`.
  """
  return transforms.apollo_mini(
    learning_rate,
    inner=_adam(8, b1, b2, eps, kind, block_size, min_size, layout),
    refresh_every=refresh_every,
    basis=basis_of(basis),
    scale=scale,
    stagger=stagger,
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
