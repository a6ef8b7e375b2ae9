"""Weights in 8 bits that are trained: codes, scales, and how an update is added to them.

Shapes in this file: a weight is `[..., m, n]`; `b` neighbours along m share a scale, so codes are
`[..., m, n]` and scales `[..., m / b, n]`, both on the weight's own axes, and the weight's sharding
is theirs.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding

from memjax.weights.weight import dot

STEPS = 127  # Codes on each side of zero.
BLOCK = 256  # Most numbers that share a scale.
# Blocks run along m because a TPU lays int8 out in tiles of 32 x 128: cutting m into multiples of
# 32 moves nothing, cutting n would copy the matrix in f32.
TILE = 32
LEAST = 64  # Scales take a 16th of the codes then.


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('codes', 'scales'), meta_fields=('dtype',)
)
@dataclasses.dataclass(frozen=True)
class Int8:
  """A weight in 8 bits, symmetric around zero: `codes * scales`, a scale for each block.

  Takes `1 + 4 / b` bytes a number. Wherever it is used it is dequantised whole, in `dtype`: in a
  loop over layers that is one matrix of one layer at a time.

  Codes have no derivative. A step that trains such leaves differentiates with respect to what
  `dense` returns, and adds the update with `add`.

  Attributes:
    codes: i8[..., m, n], from -127 to 127.
    scales: f32[..., m / b, n], the step between two codes: the block's largest magnitude / 127.
    dtype: Of the array that this leaf stands for.

  References:
    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
    Gradients <https://arxiv.org/abs/2407.08296>`_, 2024 (with blocks of 256 along n and a zero
    point)
  """

  codes: jax.Array
  scales: jax.Array
  dtype: np.dtype

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w[m, n]`, or `x[..., n] @ w^T`, in `x.dtype`."""
    return dot(x, self.materialize(), transpose)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the weight, dequantising them alone; NaN for ids out of range."""
    block = self.codes.shape[-2] // self.scales.shape[-2]
    codes = jnp.take(self.codes, ids, axis=0, mode='clip')
    # Rows beyond the last have no scale, hence NaN.
    scales = jnp.take(self.scales, ids // block, axis=0, mode='fill')
    return (codes.astype(jnp.float32) * scales).astype(self.dtype)

  def materialize(self) -> jax.Array:
    """Returns the array `[..., m, n]` that this leaf stands for."""
    # A TPU's compiler that sees through the reshape makes an f32 matrix of codes first.
    codes = lax.optimization_barrier(self.codes.reshape(self._cut_shape()))
    return _times(codes, self.scales).astype(self.dtype).reshape(self.codes.shape)

  def spread(self, entries: tuple) -> 'Int8':
    """See `memjax.sharding.weight_shardings`."""
    return dataclasses.replace(self, codes=tuple(entries), scales=tuple(entries))

  def add(self, update: jax.Array, key: jax.Array | None = None) -> 'Int8':
    """Returns this weight plus an update, in new codes and scales.

    Args:
      update: `[..., m, n]`.
      key: Key of the stochastic rounding; None rounds to nearest, which loses updates under half a
        step, a 254th of the block's largest weight.
    """
    shape = self._cut_shape()
    old, update = (self.codes.reshape(shape), self.scales), update.reshape(shape)
    total = lambda old: _times(*old) + update.astype(jnp.float32)
    scales = _scales(total(old))
    # The sum is formed twice: to keep it would take an f32 matrix.
    old, scales = lax.optimization_barrier((old, scales))
    codes = _codes(total(old), scales, key).reshape(self.codes.shape)
    return Int8(codes, scales, self.dtype)

  def _cut_shape(self):
    *batch, m, n = self.codes.shape
    blocks = self.scales.shape[-2]
    return *batch, blocks, m // blocks, n


def quantise(x: jax.Array, dtype=None, key: jax.Array | None = None) -> Int8:
  """Returns an array as `Int8`.

  With a key, numbers between two codes become either, with the odds of their nearness, so that the
  expected weight is the number itself to 2**-17 of a step.

  Args:
    x: `[..., m, n]`.
    dtype: Of the array that the result stands for; default that of `x`.
    key: Key of the stochastic rounding; None rounds to nearest.

  Raises:
    ValueError: for an array with fewer than two axes.

  >>> w = quantise(jnp.array([[1.27, 0.0], [-0.5, 2.54]]))
  >>> w.codes.tolist(), [round(float(s), 3) for s in w.scales[0]]
  ([[127, 0], [-50, 127]], [0.01, 0.02])
  """
  if x.ndim < 2:
    raise ValueError(f'an array of shape {x.shape} is no matrix; keep it as it is')
  *batch, m, n = x.shape
  block = block_size(m)
  cut = x.astype(jnp.float32).reshape(*batch, m // block, block, n)
  scales = _scales(cut)
  codes = _codes(cut, scales, key).reshape(x.shape)
  return Int8(codes, scales, np.dtype(x.dtype if dtype is None else dtype))


def _times(codes, scales):
  """The numbers f32[..., m / b, b, n] that codes of that shape stand for."""
  return codes.astype(jnp.float32) * scales[..., None, :]


def _scales(cut):
  scales = jnp.max(jnp.abs(cut), axis=-2) / STEPS
  # What divides must be a normal number: the reciprocal of others is infinite.
  return jnp.where(scales < np.finfo(np.float32).tiny, 0, scales)


def _codes(cut, scales, key):
  steps = cut / jnp.where(scales == 0, 1, scales)[..., None, :]
  if key is None:
    steps = jnp.round(steps)
  else:
    # In the middle of its interval, so that 16 bits of noise have no bias.
    noise = jax.random.bits(key, cut.shape, jnp.uint16).astype(jnp.float32) + np.float32(0.5)
    steps = jnp.floor(steps + noise * np.float32(2**-16))
  return jnp.clip(steps, -STEPS, STEPS).astype(jnp.int8)


def block_size(rows: int) -> int:
  """Returns how many of `m` rows share a scale: at most 256, a divisor of m.

  Among multiples of 32 from 64 on, or all divisors where there is none, it is the one that lets
  most devices, up to 8, hold whole blocks, and then the largest. Depends on m alone: a checkpoint
  of one mesh is read on another.

  >>> [block_size(m) for m in (4096, 11008, 5120, 13824, 172)]
  [256, 64, 160, 192, 172]
  """
  divisors = [size for size in range(1, min(rows, BLOCK) + 1) if rows % size == 0]
  tiled = [size for size in divisors if size % TILE == 0 and size >= LEAST]
  return max(tiled or divisors[-1:], key=lambda size: (math.gcd(rows // size, 8), size))


def dense(tree):
  """Returns a tree of parameters with arrays in place of its `Int8` leaves, as a transform and
  `jax.grad` want them.

  Shapes give shapes, shardings shardings. Costs what the leaves save: meant for one layer.
  """
  return jax.tree.map(_dense, tree, is_leaf=lambda x: isinstance(x, Int8))


def _dense(leaf):
  if not isinstance(leaf, Int8):
    return leaf
  if isinstance(leaf.codes, Sharding):
    return leaf.codes
  if isinstance(leaf.codes, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.codes.shape, leaf.dtype, sharding=leaf.codes.sharding)
  return leaf.materialize()
