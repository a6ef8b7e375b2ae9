"""Frozen weights in 4 bits: NormalFloat codes, two a byte, and scales that are codes themselves.

Shapes in this file: a weight is `[..., m, n]`; `b` neighbours along m share a scale. A block's `b`
codes lie in `h = ceil(b / 2)` bytes, so bytes are `[..., h m / b, n]` and scales `[..., m / b, n]`,
both on the weight's own axes, and the weight's sharding is theirs.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memjax.weights import int8
from memjax.weights.frozen import spread
from memjax.weights.weight import Weight, dot, materialize

# Quantiles of the normal distribution, 8 of each sign (zero among the negative), over the largest;
# to the bit what the published implementation holds.
LEVELS = np.array(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)

# Numbers that share a scale, as published, and the 32 rows of bytes that a TPU keeps in one tile.
BLOCK = 64


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('codes', 'scales'),
  meta_fields=('block', 'dtype'),
)
@dataclasses.dataclass(frozen=True)
class NF4:
  """A weight in 4 bits: `LEVELS[codes] * scales`, a scale for each block.

  Takes `1 / 2 + 1 / b + 4 / (b c)` bytes a number, where `c = m / b`, at most 256, scales share one
  of theirs: 0.517 for 4096 rows, and 0.5625 with scales in f32. Wherever it is used it is
  dequantised whole, in `dtype`: in a loop over layers that is one matrix of one layer at a time.

  Qwix has this form too, behind providers that take over the products of Flax modules, with scales
  in full; a model here is a function of its leaves, and asks a leaf for the product.

  It is not trained: an update is a small part of the distance between two codes. What is trained
  lies beside it, see `memjax.adapters`.

  Attributes:
    codes: u8[..., h m / b, n]: of each block the first `h` rows in the high bits, the others in the
      low ones. Two rows of one block and not of two halves of the matrix, so that a device's share
      of rows is its share of bytes.
    scales: The largest magnitude of each block, f32[..., m / b, n] or such an `Int8`.
    block: Numbers that share a scale.
    dtype: Of the array that this leaf stands for.

  References:
    Dettmers et al., `QLoRA: Efficient Finetuning of Quantized LLMs
    <https://arxiv.org/abs/2305.14314>`_, 2023 (with 8-bit floats for scales less their mean)
  """

  codes: jax.Array
  scales: jax.Array | Weight
  block: int
  dtype: np.dtype

  TRAINED: ClassVar = ()

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w[m, n]`, or `x[..., n] @ w^T`, in `x.dtype`."""
    return dot(x, self.materialize(), transpose)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the weight, dequantising them alone; NaN for ids out of range."""
    half = (self.block + 1) // 2
    number, place = ids // self.block, ids % self.block
    both = jnp.take(self.codes, number * half + place % half, axis=0, mode='clip')
    codes = jnp.where((place < half)[..., None], both >> 4, both & np.uint8(15))
    # Rows beyond the last have no scale, hence NaN.
    scales = jnp.take(materialize(self.scales), number, axis=0, mode='fill')
    return (decode(codes) * scales).astype(self.dtype)

  def materialize(self) -> jax.Array:
    """Returns the array `[..., m, n]` that this leaf stands for."""
    return self._float32().astype(self.dtype)

  def spread(self, entries: tuple) -> 'NF4':
    """See `memjax.sharding.weight_shardings`."""
    return dataclasses.replace(self, codes=tuple(entries), scales=spread(self.scales, entries))

  def add(self, update: jax.Array, key: jax.Array | None = None) -> 'NF4':
    """Returns this weight plus an update, in new codes and scales.

    Args:
      update: `[..., m, n]`.
      key: Key of the stochastic rounding; None rounds to nearest, which loses updates under half
        the distance to the next code, a 25th to a 7th of the block's largest weight.
    """
    double = not isinstance(self.scales, jax.Array)
    return quantise_nf4(self._float32() + update.astype(jnp.float32), self.dtype, key, double)

  def _float32(self):
    scales = materialize(self.scales)
    *batch, blocks, n = scales.shape
    codes = self.codes.reshape(*batch, blocks, (self.block + 1) // 2, n)
    codes = jnp.concatenate([codes >> 4, codes & np.uint8(15)], axis=-2)[..., : self.block, :]
    return (decode(codes) * scales[..., None, :]).reshape(*batch, blocks * self.block, n)


def quantise_nf4(
  x: jax.Array, dtype: Any = None, key: jax.Array | None = None, double: bool = True
) -> NF4:
  """Returns an array as `NF4`.

  With a key, numbers between two levels become either, with the odds of their nearness, so that the
  expected weight is the number itself to 2**-17 of the distance between them.

  Args:
    x: `[..., m, n]`; m a multiple of 64 is cut into blocks of 64, another into the largest blocks
      under 64 that divide it.
    dtype: Of the array that the result stands for; default that of `x`.
    key: Key of the stochastic rounding; None rounds to nearest.
    double: Keeps the scales in 8 bits, which moves them by at most a 254th of the largest.

  Raises:
    ValueError: for an array with fewer than two axes.

  >>> w = quantise_nf4(jnp.array([[2.0, 0.0], [-1.0, 0.5]]), double=False)
  >>> w.codes.tolist(), w.scales.tolist()
  ([[242, 127]], [[2.0, 0.5]])
  >>> w.materialize().tolist()
  [[2.0, 0.0], [-1.0501461029052734, 0.5]]
  """
  if x.ndim < 2:
    raise ValueError(f'an array of shape {x.shape} is no matrix; keep it as it is')
  *batch, m, n = x.shape
  block = block_size(m)
  cut = x.astype(jnp.float32).reshape(*batch, m // block, block, n)
  scales = jnp.max(jnp.abs(cut), axis=-2)
  # What divides must be a normal number: the reciprocal of others is infinite.
  scales = jnp.where(scales < np.finfo(np.float32).tiny, 0, scales)
  scales = int8.quantise(scales) if double else scales
  known = materialize(scales)
  codes = encode(cut / jnp.where(known == 0, 1, known)[..., None, :], key)
  half = (block + 1) // 2
  # Of an odd block the last half byte is nobody's.
  pairs = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, 2 * half - block), (0, 0)])
  packed = pairs[..., :half, :] << 4 | pairs[..., half:, :]
  packed = packed.reshape(*batch, m // block * half, n)
  return NF4(packed, scales, block, np.dtype(x.dtype if dtype is None else dtype))


def block_size(rows: int) -> int:
  """Returns how many of `m` rows share a scale: the largest divisor up to 64.

  >>> [block_size(m) for m in (4096, 11008, 5461, 176)]
  [64, 64, 43, 44]
  """
  return max(size for size in range(1, min(rows, BLOCK) + 1) if rows % size == 0)


def decode(codes: jax.Array) -> jax.Array:
  """Returns the levels of codes, f32.

  A tree of choices by the codes' bits: a table of 16 numbers is slow to read on a TPU, and on all
  devices the choices are fused into what unpacks and scales.
  """
  bits = [(codes & np.uint8(1 << place)) != 0 for place in range(4)]
  # Levels must depend on the codes until XLA simplifies them: a derivative of `lax.scan` takes what
  # does not out of the loop, arrays of the matrix's size full of one constant each.
  zero = (codes & np.uint8(0)).astype(jnp.float32)

  def choose(levels, place):
    if place < 0:
      return zero + levels[0]
    low, high = np.split(levels, 2)
    return jnp.where(bits[place], choose(high, place - 1), choose(low, place - 1))

  return choose(LEVELS, 3)


def encode(x: jax.Array, key: jax.Array | None = None) -> jax.Array:
  """Returns the codes u8 of numbers in [-1, 1]: of the nearest level, or with a key one of the two
  beside them.
  """
  low, high = LEVELS[:-1], LEVELS[1:]
  if key is None:
    limits = (low + high) / 2
  else:
    # In the middle of its interval, so that 16 bits of noise have no bias.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.float32) + np.float32(0.5)
    limits = [a + noise * np.float32((b - a) * 2**-16) for a, b in zip(low, high)]
  passed = ((x > limit).astype(jnp.uint8) for limit in limits)
  return sum(passed, jnp.zeros(x.shape, jnp.uint8))
