"""DoRA: a column's direction is adapted, its length is trained by itself."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.adapters.lora import LoRA
from memjax.weights.dora import column_squares


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
  """`(W + s A B) diag(g / |W + s A B|)`, for `memjax.adapters.attach`: lengths of columns begin as
  those of W.

  Attributes are those of `LoRA`; dropout concerns what `s A B` sees alone. State of an optimizer
  with two moments is `2 r (m + n) + 2 n` numbers a matrix, and `n` more are kept.

  References:
    Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024 (the official layer drops
    activations of W too, and divides by zero at a column of zeros)
  """

  def adapt(self, matrix: Any, key: jax.Array) -> weights.DoRA:
    """Returns the adapted leaf of a matrix `[m, n]`."""
    square = column_squares(matrix)
    return weights.DoRA(super().adapt(matrix, key), jnp.sqrt(square), square)
