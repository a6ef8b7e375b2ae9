"""Blocks of flattened tensors, and tables of codes, as the PyTorch packages keep 8-bit state.

Shapes in this file: a PyTorch tensor of `N` numbers is `[N]`; `L` layers stacked in a leaf are `L`
tensors, `[L, N]`, be they matrices or vectors. A block of `b` numbers of the flattened tensor
shares a scale.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.transforms import units


class Flat(NamedTuple):
  """A quantised tensor."""

  codes: jax.Array  # u8[..., N], u8[..., N / 2] or f8[..., N].
  scales: jax.Array  # f32[..., ceil(N / b)].


def flatten(path: str, x: jax.Array) -> jax.Array:
  """Returns each tensor's numbers in PyTorch's order: a Flax kernel is its weight transposed."""
  batch = units.batch_shape(path, x)
  return (x.mT if _is_kernel(path, x) else x).reshape(*batch, -1)


def unflatten(path: str, flat: jax.Array, like: jax.Array) -> jax.Array:
  """Undoes `flatten` of an array of the shape of `like`."""
  if not _is_kernel(path, like):
    return flat.reshape(like.shape)
  return flat.reshape(like.mT.shape).mT


def _is_kernel(path, leaf) -> bool:
  """Whether a leaf is the transpose of its PyTorch weight."""
  return leaf.ndim > 1 and re.search(r'kernel$', units.adapted_path(path)) is not None


def blocks(flat: jax.Array, size: int) -> jax.Array:
  """Cuts `[..., N]` into `[..., ceil(N / size), size]`, zeros after the end."""
  padding = -flat.shape[-1] % size
  flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, padding)])
  return flat.reshape(*flat.shape[:-1], -1, size)


def join(cut: jax.Array, numbers: int) -> jax.Array:
  """Undoes `blocks`."""
  return cut.reshape(*cut.shape[:-2], -1)[..., :numbers]


def dynamic_map(signed: bool, exponent_bits: int = 7) -> np.ndarray:
  """`create_dynamic_map` of both packages, in its f32 arithmetic, f32[256] or f32[16]."""
  numbers = [0.0, 1.0]
  for i in range(exponent_bits):
    ends = _linspace(2 ** (i + (not signed)) + 1)
    middles = np.float32(10 ** (i + 1 - exponent_bits)) * ((ends[:-1] + ends[1:]) / np.float32(2))
    numbers += [*middles, *(-middles if signed else [])]
  return np.sort(np.asarray(numbers, np.float32))


def _linspace(count):
  """`torch.linspace(0.1, 1, count)`: each half counts from its own end, by fused multiply-adds."""
  start, end = np.float32(0.1), np.float32(1)
  step = np.float64((end - start) / np.float32(count - 1))
  k = np.arange(count)
  ends = np.where(k < count // 2, start + step * k, end - step * (count - 1 - k))
  return ends.astype(np.float32)


def lookup(table: np.ndarray, codes: jax.Array) -> jax.Array:
  """Returns `table[codes]`."""
  return jnp.take(jnp.asarray(table), codes.astype(jnp.int32), mode='clip')
