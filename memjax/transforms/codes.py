"""Codes of 8 and 4 bits for numbers in [-1, 1], in closed form.

A table of 256 numbers is slow to search everywhere and slow to read on a TPU. Each map here is
piecewise linear in the code, so that both directions are a few vector instructions. `tables` holds
the same maps as the official packages write them; the tests compare the two.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

KINDS = ('dynamic', 'linear', 'fp8')


class Code(NamedTuple):
  """One map between numbers and codes; two 4-bit codes share a byte once they are packed."""

  encode: Callable[[jax.Array], jax.Array]  # f32 in [-1, 1] -> codes, to the nearest.
  decode: Callable[[jax.Array], jax.Array]  # Codes -> f32.
  dtype: jnp.dtype
  bits: int


def make(kind: str, bits: int, signed: bool) -> Code:
  """Returns the code of a kind.

  `'dynamic'` spends its codes on seven decades (three at 4 bits), each with twice the codes of the
  decade below: relative accuracy near 1, and small numbers do not vanish (Dettmers et al., 2022).
  It has a 0 and a 1 but no -1. At 4 bits without a sign it is linear and has no 0, so that no
  second moment vanishes under a root (Li et al., 2023). `'linear'` has equal steps, symmetric with
  a sign, without a 0 otherwise. `'fp8'` is float8_e4m3fn, signed or not.

  Raises:
    ValueError: for a kind or a number of bits that does not exist.
  """
  if kind not in KINDS:
    raise ValueError(f'kind must be one of {", ".join(KINDS)}; got {kind!r}')
  if bits not in (4, 8):
    raise ValueError(f'bits must be 4 or 8, got {bits!r}')
  if kind == 'fp8':
    if bits != 8:
      raise ValueError("kind='fp8' has 8 bits; with bits=4 use 'dynamic' or 'linear'")
    return _fp8()
  if kind == 'linear' or (bits == 4 and not signed):
    return _linear(bits, signed)
  return _dynamic(bits, signed)


def _dynamic(bits: int, signed: bool) -> Code:
  """Decade `i` of `decades` has `2**(i + s)` codes in `(0.1, 1) * 10**(i + 1 - decades)`.

  Counted from zero up, the code `k` of decade `i` satisfies `k + s = 2**(i + s) + j`: its decade is
  the exponent of a float, its place `j` within the decade the mantissa.
  """
  decades = 7 if bits == 8 else 3
  s = 0 if signed else 1
  zero = 2 ** (bits - 1) - 1 if signed else 0
  top = 2**bits - 1 - zero  # Where 1 is.
  exponents = range(s, decades + s)
  ten = [10.0 ** (e - s + 1 - decades) for e in exponents]  # The decades' upper ends.
  lowest = [t * (0.1 + 0.45 / 2**e) for t, e in zip(ten, exponents)]
  highest = [t * (1.0 - 0.45 / 2**e) for t, e in zip(ten, exponents)]
  # Midpoints between neighbours of two decades; those within a decade are where `place` steps.
  starts = [lowest[0] / 2, *((a + b) / 2 for a, b in zip(highest[:-1], lowest[1:]))]
  one = (highest[-1] + 1) / 2

  def encode(x):
    size = jnp.abs(x)
    slope, first = jnp.float32(0), jnp.float32(0)
    for start, t, e in zip(starts, ten, exponents):
      above = size >= np.float32(start)
      slope = jnp.where(above, np.float32(2**e / (0.9 * t)), slope)
      first = jnp.where(above, np.float32(2**e), first)
    # The decade begins at a tenth of its upper end, a ninth of its length above nought.
    place = jnp.floor(size * slope + first * np.float32(8 / 9))
    k = jnp.clip(place, first, 2 * first - 1) - s
    k = jnp.where(first > 0, k, 0)
    k = jnp.where(x >= np.float32(one), top, k)
    return (zero + jnp.where(x < 0, -k, k)).astype(jnp.uint8)

  def decode(codes):
    k = codes.astype(jnp.int32) - zero
    middle = jnp.abs(k).astype(jnp.float32) + np.float32(s + 0.5)
    bits_of = lax.bitcast_convert_type(middle, jnp.int32)
    exponent = bits_of & np.int32(0xFF << 23)
    mantissa = lax.bitcast_convert_type(bits_of - exponent | np.int32(127 << 23), jnp.float32)
    scale = jnp.float32(ten[-1])
    for t, e in zip(ten[-2::-1], exponents[-2::-1]):
      scale = jnp.where(exponent <= np.int32((127 + e) << 23), np.float32(t), scale)
    size = jnp.where(k == top, 1, scale * (np.float32(0.9) * mantissa - np.float32(0.8)))
    return jnp.where(k == 0, 0, jnp.where(k < 0, -size, size))

  return Code(encode, decode, jnp.dtype(jnp.uint8), bits)


def _linear(bits: int, signed: bool) -> Code:
  # Signed: -steps..steps, the code after the last unused. Unsigned: 1..steps, of steps.
  steps = 2 ** (bits - 1) - 1 if signed else 2**bits
  zero = steps if signed else -1
  lowest = -steps if signed else 1

  def encode(x):
    nearest = jnp.clip(jnp.floor(x * np.float32(steps) + np.float32(0.5)), lowest, steps)
    return (nearest + zero).astype(jnp.uint8)

  def decode(codes):
    return (codes.astype(jnp.int32) - zero).astype(jnp.float32) * np.float32(1 / steps)

  return Code(encode, decode, jnp.dtype(jnp.uint8), bits)


def _fp8() -> Code:
  dtype = jnp.dtype(jnp.float8_e4m3fn)
  largest = np.float32(jnp.finfo(dtype).max)
  return Code(
    encode=lambda x: (x * largest).astype(dtype),
    decode=lambda codes: codes.astype(jnp.float32) * (1 / largest),
    dtype=dtype,
    bits=8,
  )


def block_bytes(bits: int, block_size: int) -> float:
  """Bytes a number, its share of the block's f32 scale included.

  >>> 2 * block_bytes(8, 256), 2 * block_bytes(4, 128)
  (2.03125, 1.0625)
  """
  return bits / 8 + 4 / block_size


def pack(codes: jax.Array, axis: int) -> jax.Array:
  """Puts two 4-bit codes into each byte: the first half of `axis` high, the second half low.

  Halves, not neighbours: they are contiguous, and so are their bytes.
  """
  high, low = jnp.split(codes, 2, axis=axis)
  return high << 4 | low


def unpack(codes: jax.Array, axis: int) -> jax.Array:
  """Undoes `pack`."""
  return jnp.concatenate([codes >> 4, codes & np.uint8(15)], axis=axis)


def largest_divisor(size: int, limit: int, multiple_of: int = 1) -> int:
  """Largest divisor of `size` up to `limit` that `multiple_of` divides; 0 if there is none.

  >>> largest_divisor(768, 256), largest_divisor(1376, 256), largest_divisor(7, 256, 2)
  (256, 172, 0)
  """
  found = 0
  for low in range(1, math.isqrt(size) + 1):
    if size % low == 0:
      found = max([found, *(d for d in (low, size // low) if d <= limit and d % multiple_of == 0)])
  return found
