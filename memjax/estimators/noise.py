"""Noise with an address: the numbers of a matrix, each a function of a key and of its own place.

Shapes in this file: a matrix is `[..., m, n]`, keys are `u32[..., k]` with the same leading axes,
one key a layer; `k` is 2, or 4 for noise with a mask.

A number is a hash of (key, row, column) and of nothing else. So any rows can be drawn without the
others, a device draws its own shard without hearing of the others, the compiler fuses the draw
into what uses it, and a log of a training run can be replayed on another mesh and another version
of JAX: the bits of `jax.random.normal` are a matter of both (jax-ml/jax#40232). The hash is
Threefry-2x32 with 13 rounds, the fewest that pass all tests of BigCrush.

References:
  Salmon et al., `Parallel Random Numbers: As Easy as 1, 2, 3
  <https://doi.org/10.1145/2063384.2063405>`_, 2011
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memjax.naming import fold_in_path, nearest

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = np.uint32(0x1BD11BDA)


def address(root: jax.Array, draw: jax.Array | int, path: str) -> jax.Array:
  """Returns the key of a leaf: `u32[2]`.

  Args:
    root: PRNG key of the run.
    draw: Number of the draw; the step where there is one draw a step.
    path: The leaf's slash path, see `memjax.naming.path_string`.
  """
  return _words(fold_in_path(jax.random.fold_in(root, draw), path))


def layer_keys(key: jax.Array, layers: jax.Array) -> jax.Array:
  """Returns a key for each layer of a stacked leaf: `u32[L, 2]`, from `u32[2]` and `i32[L]`."""
  typed = jax.random.wrap_key_data(key, impl='threefry2x32')
  return jax.vmap(lambda layer: _words(jax.random.fold_in(typed, layer)))(layers)


@dataclasses.dataclass(frozen=True)
class Noise:
  """A family of noise with mean 0, variance 1 and independent numbers, in f32.

  Attributes:
    name: For messages.
    of_bits: Maps random bits `u32[...]` to numbers `f32[...]`.
    on_sphere: Whether all numbers of all leaves together are scaled to the sphere of radius
      `sqrt(d)`, for `d` of them; an estimator sees to that, see `squared_norm`.
  """

  name: str
  of_bits: Callable[[jax.Array], jax.Array]
  on_sphere: bool = False

  def key(self, root: jax.Array, draw, path: str, layers: jax.Array | None = None) -> jax.Array:
    """Returns the key of a leaf, `u32[k]`, or of the given layers of a stacked one, `u32[L, k]`."""
    key = address(root, draw, path)
    return key if layers is None else layer_keys(key, layers)

  def draw(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns `f32[shape]`, whose leading axes are those of the key."""
    return _draw(self, key, tuple(shape))

  def rows(self, key: jax.Array, ids: jax.Array, width: int) -> jax.Array:
    """Returns rows `ids` of what `draw` gives for a matrix of `width` columns: `f32[*ids.shape,
    width]`.
    """
    return _rows(self, key, ids, width)

  def at(self, key: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Returns the numbers at places `u32[...]` of one matrix: a window of it, or single rows."""
    return self.of_bits(hash_bits(key[:2], row, column))


@dataclasses.dataclass(frozen=True)
class Sparse(Noise):
  """Noise in which only some of the numbers are not zero; see `sparse`."""

  density: float = 1.0
  resample_every: int = 1

  def key(self, root, draw, path, layers=None):
    place = super().key(root, draw, path, layers)
    mask_root = jax.random.fold_in(root, np.uint32(_PARITY))  # The mask's draws are others.
    mask = super().key(mask_root, draw // self.resample_every, path, layers)
    return jnp.concatenate([place, mask], axis=-1)

  def at(self, key, row, column):
    # Bits and threshold are compared as u32: the share of ones is the density to 2**-32.
    threshold = np.uint32(min(round(self.density * 2**32), 2**32 - 1))
    kept = hash_bits(key[2:], row, column) <= threshold
    return jnp.where(kept, super().at(key, row, column), 0)


def sparse(noise: Noise, density: float, resample_every: int = 1) -> Sparse:
  """Noise that is zero at random places, the same ones for `resample_every` draws.

  The mask is hashed where the noise is drawn and never stored. A direction with `density * d`
  numbers estimates the gradient in these coordinates and zero elsewhere.

  Args:
    noise: Of the other places.
    density: Share of the numbers that are not masked, in (0, 1]. The published code compares with
      normal instead of uniform noise, so that its 'sparsity 0.1' masks 54 %.
    resample_every: Draws that share a mask.

  Raises:
    ValueError: for a density outside (0, 1], or fewer than one draw a mask.

  References:
    Zhang et al., `Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A
    Benchmark <https://arxiv.org/abs/2402.11592>`_, 2024
  """
  if not 0 < density <= 1:
    raise ValueError(f'density is {density}; it is the share of numbers perturbed, in (0, 1]')
  if resample_every < 1:
    raise ValueError(f'resample_every is {resample_every}; a mask serves at least one draw')
  return Sparse(
    f'sparse {noise.name}', noise.of_bits, noise.on_sphere, float(density), int(resample_every)
  )


def hash_bits(key: jax.Array, row: jax.Array, column: jax.Array, rounds: int = 13) -> jax.Array:
  """Returns `u32[...]`: the first word of Threefry-2x32 of two counters `u32[...]`.

  Args:
    key: `u32[2]`.
    row: First word of the counter.
    column: Second word, of the same shape.
    rounds: Of the cipher; 20 gives the bits of JAX's own generator.
  """
  schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
  x, y = row + schedule[0], column + schedule[1]
  for i in range(rounds):
    x = x + y
    turn = _ROTATIONS[i % 8]
    y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
    if i % 4 == 3:
      turn = i // 4 + 1
      x = x + schedule[turn % 3]
      y = y + schedule[(turn + 1) % 3] + np.uint32(turn)
  return x


def _normal(bits):
  """Magnitude from 23 bits, at most 5.4, and sign from another: exactly symmetric around zero."""
  uniform = ((bits >> np.uint32(9)).astype(jnp.float32) + np.float32(0.5)) * np.float32(2**-23)
  # The sign comes first: what asks for the bits again after the logarithm makes XLA's GPU backend
  # (JAX 0.11) write both to memory, 8 bytes for a number of 2.
  uniform = jnp.where(bits & np.uint32(1), uniform, -uniform)
  number = np.float32(math.sqrt(2)) * lax.erf_inv(uniform)
  # Of numbers below 6 no change. But a product by a constant XLA may join with the products that
  # follow, in one program and not in another: a replay would differ from its run in the last bit.
  return jnp.minimum(number, np.float32(6))


def _sign(bits):
  # The exponent of 1.0 under the random sign bit: cheaper than a choice.
  one = np.uint32(0x3F800000)
  return lax.bitcast_convert_type((bits & np.uint32(0x80000000)) | one, jnp.float32)


gaussian = Noise('gaussian', _normal)
rademacher = Noise('rademacher', _sign)
sphere = Noise('sphere', _normal, on_sphere=True)

FAMILIES = {noise.name: noise for noise in (gaussian, rademacher, sphere)}


def family(noise: Noise | str, density: float = 1.0, resample_every: int = 1) -> Noise:
  """Returns a family of noise by its name; one that is a family already, as it is.

  Args:
    noise: A name in `FAMILIES`, or a family.
    density: With less than 1 the noise is `sparse`.
    resample_every: As in `sparse`.

  Raises:
    ValueError: for an unknown name, and as `sparse`.
  """
  if isinstance(noise, str):
    if noise not in FAMILIES:
      raise ValueError(f'no noise is called {noise!r}; {nearest(noise, FAMILIES)}')
    noise = FAMILIES[noise]
  return noise if density == 1 else sparse(noise, density, resample_every)


# Compiled as one program also outside of one, instead of a program for each of 80 operations.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _draw(noise, key, shape):
  if key.ndim > 1:
    return jax.vmap(lambda key: _draw(noise, key, shape[1:]))(key)
  row, column = _counters(shape)
  return noise.at(key, row, column).reshape(shape)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _rows(noise, key, ids, width):
  row = jnp.broadcast_to(ids[..., None], (*ids.shape, width)).astype(jnp.uint32)
  column = lax.broadcasted_iota(jnp.uint32, row.shape, row.ndim - 1)
  return noise.at(key, row, column)


def _counters(shape):
  """Row and column of every number, `u32[rows, columns]`; a vector is one row."""
  columns = shape[-1] if shape else 1
  shape = (math.prod(shape[:-1]), columns)
  return tuple(lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))


def _words(key):
  return jax.random.key_data(key).reshape(-1)[:2]
