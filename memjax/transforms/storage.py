"""How bases are kept between updates.

Shapes in this file: a basis is `[..., m, r]`, or `[..., r, n]` for a row space; its long axis keeps
its place in all that is stored, so that the parameter's sharding is the basis's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Storage(NamedTuple):
  """What a basis becomes in the state of `project`."""

  # (basis, its long axis, -2 or -1) -> arrays to keep.
  pack: Callable[[jax.Array, int], tuple[jax.Array, ...]]
  # One tree for each of those arrays -> field of the state.
  field: Callable[..., Any] = lambda tree: tree


class PackedBases(NamedTuple):
  """Bases in 8 or 4 bits; leaves without one have `optax.MaskedNode()`."""

  codes: optax.Updates  # i8 [..., m, r] or, two a byte, u8 [..., m, r/2]; [..., r, n] likewise.
  scales: optax.Updates  # f32 [..., m, ceil(r/block)], largest magnitude of each block.


def whole() -> Storage:
  """Keeps bases as they are, in f32."""
  return Storage(lambda basis, axis: (basis,))


def packed(bits: int = 4, block: int = 128) -> Storage:
  """Keeps bases in 8 or 4 bits, each block scaled by its largest magnitude.

  Blocks are neighbours in the short axis, so that none spans two shards of the long one. A basis
  takes `m (r bits / 8 + 4 ceil(r / block))` bytes. An entry is off by at most `1 / (2**bits - 2)`
  of its block's largest; projecting and projecting back use the same rounded basis.

  Args:
    bits: 8, or 4 for two codes a byte, which takes an even rank.
    block: Most entries that share a scale.

  Raises:
    ValueError: for other bits, or a block of none.
  """
  if bits not in (4, 8):
    raise ValueError(f'bits must be 4 or 8, got {bits!r}')
  if block < 1:
    raise ValueError(f'a block of codes must hold at least 1, got {block!r}')

  def pack(basis, axis):
    tall = _tall(basis, axis)
    rank = tall.shape[-1]
    if bits == 4 and rank % 2:
      raise ValueError(f'two 4-bit codes make a byte: rank must be even, got {rank}; or use bits=8')
    scales = _largest(tall, -(-rank // block))
    spread, top = _spread(scales, rank), 2 ** (bits - 1) - 1
    codes = jnp.round(tall / jnp.where(spread > 0, spread, 1) * top).astype(jnp.int8)
    if bits == 4:
      codes = _pair(codes)
    return _tall(codes, axis), _tall(scales, axis)

  return Storage(pack, PackedBases)


def unpack(parts: tuple[jax.Array, ...], axis: int) -> jax.Array:
  """Returns the basis, f32, that `Storage.pack` made `parts` of."""
  if len(parts) == 1:
    return parts[0]
  codes, scales = (_tall(part, axis) for part in parts)
  top = 127
  if codes.dtype == jnp.uint8:
    codes, top = _unpair(codes), 7
  # The largest of a block comes back exactly: its code over `top` is 1.
  basis = codes.astype(scales.dtype) / top * _spread(scales, codes.shape[-1])
  return _tall(basis, axis)


def _tall(x, axis):
  return x if axis == -2 else x.mT


def _largest(tall, blocks):
  """Largest magnitude in each of `blocks` equal blocks of the last axis, the last one filled up."""
  size = -(-tall.shape[-1] // blocks)
  padding = [(0, 0)] * (tall.ndim - 1) + [(0, blocks * size - tall.shape[-1])]
  padded = jnp.pad(jnp.abs(tall), padding)
  return jnp.max(padded.reshape(*tall.shape[:-1], blocks, size), axis=-1)


def _spread(scales, rank):
  """Each block's scale at every one of its entries, `[..., rank]`."""
  return jnp.repeat(scales, -(-rank // scales.shape[-1]), axis=-1)[..., :rank]


def _pair(codes):
  """Codes in [-7, 7], two neighbours a byte, the first in the lower half."""
  nibbles = (codes + 8).astype(jnp.uint8)
  return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def _unpair(codes):
  nibbles = jnp.stack([codes & 15, codes >> 4], axis=-1)
  return nibbles.reshape(*codes.shape[:-1], -1).astype(jnp.int8) - 8
