"""MELoRA: several small adapters, each between a slice of the inputs and one of the outputs."""

import dataclasses
import math
from typing import Any

import jax

from memjax import weights
from memjax.adapters.lora import LoRA


@dataclasses.dataclass(frozen=True)
class MELoRA(LoRA):
  """`W + s diag(A_1 B_1, ..., A_k B_k)`, for `memjax.adapters.attach`.

  The state of LoRA of the same rank, for a sum whose rank is `blocks` times that.

  Attributes:
    rank: r, of each block.
    blocks: k; divides both sides of every target.

  References:
    Ren et al., `MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning
    <https://arxiv.org/abs/2402.17263>`_, 2024
  """

  blocks: int = 2

  def __post_init__(self):
    super().__post_init__()
    if self.form:
      raise ValueError(
        f"form is {self.form!r}, but blocks are multiplied one by one whatever it is; set form=''"
      )

  def check(self, path: str, shape: tuple[int, int]) -> None:
    """Raises a `ValueError` for a matrix that is not cut into blocks of this rank."""
    if self.blocks < 1 or any(side % self.blocks for side in shape):
      raise ValueError(
        f'{path}: the sides of {shape} are not multiples of blocks={self.blocks}; choose a common '
        'divisor or leave the leaf out of targets'
      )
    if self.rank > min(shape) // self.blocks:
      raise ValueError(
        f'{path}: rank {self.rank} is above {min(shape) // self.blocks}, the shorter side of one '
        f'of {self.blocks} blocks of {shape}; lower the rank or blocks'
      )

  def adapt(self, matrix: Any, key: jax.Array) -> weights.BlockDiagonal:
    """Returns the adapted leaf of a matrix `[m, n]`."""
    adapted = super().adapt(matrix, key)
    if self.init == 'kaiming':  # Within 1 / sqrt(inputs of a block).
      adapted = dataclasses.replace(adapted, a=adapted.a * math.sqrt(self.blocks))
    return weights.BlockDiagonal(adapted, self.blocks)
