"""Rotary position embedding (Su et al., 2021), in the half-rotation layout of the Hugging Face
checkpoints.

Shapes in this file: queries or keys are `[B, T, N, H]` with `N` heads of width `H`; dimension `i`
is rotated together with `i + H/2` (the original LLaMA weights pair `2i` with `2i + 1`, and are
permuted on conversion).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretching of slow rotations, which reaches `factor` times the length trained on
  first.

  Attributes:
    factor: How much slower a slow rotation becomes.
    low: A rotation with fewer turns than this over `original_length` is slowed by the whole factor.
    high: One with more turns than this is left alone; between the two the change is linear in the
      number of turns.
    original_length: Tokens in a sequence before stretching.
  """

  factor: float = 8.0
  low: float = 1.0
  high: float = 4.0
  original_length: int = 8192


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """Returns radians per position for each pair of dimensions, f32[H/2].

  >>> frequencies(4, 10000.0).round(4).tolist()
  [1.0, 0.009999999776482582]
  """
  frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  if scaling is not None:
    turns = frequency * scaling.original_length / (2 * math.pi)
    keep = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    frequency = frequency * (keep + (1 - keep) / scaling.factor)
  return frequency.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, frequency: np.ndarray) -> jax.Array:
  """Rotates each pair of dimensions by its angle, in f32; dimensions beyond the last pair stay.

  Args:
    x: Queries or keys `[B, T, N, H]`.
    positions: Position of each token, `i32[B, T]`, or `i32[1, T]` when all sequences share them.
    frequency: `f32[R/2]`, from `frequencies`; the first `R <= H` dimensions are rotated.

  Returns:
    `[B, T, N, H]` in `x.dtype`.
  """
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  pairs = frequency.shape[0]
  first, second, rest = jnp.split(x.astype(jnp.float32), (pairs, 2 * pairs), axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  rotated += [rest] if rest.shape[-1] else []
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
