"""Arrays in blocks that share a scale, quantised in place.

Shapes in this file: an array is `[..., m, n]`; its blocks run along one of the last two axes, here
n, and `b` numbers share an f32 scale, their largest magnitude. Codes are `[..., m, n]`, or `[...,
m, n / 2]` when two share a byte, scales `[..., m, n / b]`: each on its parameter's axes, so that
the parameter's sharding is theirs. Flattened blocks would straddle devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.transforms.codes import Code, largest_divisor, pack, unpack

SMALLEST = 8  # Blocks with fewer numbers would spend as much on scales as on codes.


class Blocks(NamedTuple):
  """How an array is cut into blocks; static, derived from shapes only."""

  axis: int  # -1 or -2.
  size: int  # Numbers that share a scale.


def plan(shape, block_size: int, bits: int, ways=None) -> Blocks | None:
  """Chooses the blocks of an array.

  They run along the last axis, or along the one before it where the last has no divisor between a
  quarter of `block_size` and `block_size`; their size is the largest divisor of that axis's shard.

  Args:
    shape: Shape of the array.
    block_size: Largest block.
    bits: Of a code; 4 needs blocks of even size, to pack them.
    ways: Devices that each axis is divided over, ones if None.

  Returns:
    The blocks, or None for an array whose axes have no divisor of 8 to `block_size`.
  """
  ways = (1,) * len(shape) if ways is None else ways
  best = Blocks(-1, 0)
  for axis in (-1, -2)[: len(shape)]:
    size = largest_divisor(shape[axis] // ways[axis], block_size, 8 // bits)
    if size > best.size:
      best = Blocks(axis, size)
    if best.size >= block_size // 4:
      break
  return best if best.size >= min(SMALLEST, block_size) else None


class Packed(NamedTuple):
  """A quantised array."""

  codes: jax.Array  # [..., m, n] or [..., m, n / 2].
  scales: jax.Array  # f32[..., m, n / b].


def blocks_of(packed: Packed, bits: int) -> Blocks:
  """Reads the blocks off the shapes of codes and scales."""
  codes, scales = (x.shape for x in packed)
  axis = next(a for a in (-1, -2) if codes[a] != scales[a])
  return Blocks(axis, 8 // bits * codes[axis] // scales[axis])


def shape(packed: Packed, bits: int) -> tuple[int, ...]:
  """Shape of the array that is quantised."""
  sizes = list(packed.codes.shape)
  sizes[blocks_of(packed, bits).axis] *= 8 // bits
  return tuple(sizes)


def quantise(x: jax.Array, blocks: Blocks, code: Code) -> Packed:
  """Rounds to codes and scales.

  A block of zeros has scale 0 and decodes to zeros whatever its codes. In a block with a NaN or an
  infinity no number stays finite.
  """
  axis = blocks.axis
  cut = _cut(x.astype(jnp.float32), axis, blocks.size)
  scales = jnp.max(jnp.abs(cut), axis=axis, keepdims=True)
  # What divides must be a normal number: the reciprocal of others is infinite.
  tiny = np.finfo(np.float32).tiny
  scales = jnp.where(scales < tiny, 0, scales)
  codes = code.encode(cut / jnp.where(scales == 0, 1, scales))
  if code.bits == 4:
    codes = pack(codes, axis)
  return Packed(_join(codes, axis), jnp.squeeze(scales, axis))


def dequantise(packed: Packed, code: Code) -> jax.Array:
  """Returns the f32 array that codes and scales stand for."""
  axis, size = blocks_of(packed, code.bits)
  cut = _cut(packed.codes, axis, size * code.bits // 8)
  if code.bits == 4:
    cut = unpack(cut, axis)
  return _join(code.decode(cut) * jnp.expand_dims(packed.scales, axis), axis)


def _cut(x, axis, size):
  """Splits `axis` (from the end) into blocks; they come before it, `axis` itself is `size` long."""
  at = x.ndim + axis
  return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])


def _join(x, axis):
  at = x.ndim + axis - 1
  return x.reshape(*x.shape[:at], x.shape[at] * x.shape[at + 1], *x.shape[at + 2 :])
