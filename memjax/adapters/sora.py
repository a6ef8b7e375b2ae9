"""SoRA: the training finds each matrix's rank."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memjax import weights
from memjax.adapters.lora import LoRA
from memjax.adapters.rates import only
from memjax.transforms.soft_threshold import soft_threshold


@dataclasses.dataclass(frozen=True)
class SoRA(LoRA):
  """`W + s A diag(g) B` with gates g that a penalty sends to zero, for `memjax.adapters.attach`.

  Every update of a gate is followed by the proximal step of `penalty |g|`. State of an optimizer
  with two moments is `2 r (m + n) + 2 r` numbers a matrix.

  Attributes:
    penalty: Of the gates' absolute values, in the loss's units.

  References:
    Ding et al., `Sparse Low-rank Adaptation of Pre-trained Language Models
    <https://arxiv.org/abs/2311.11696>`_, 2023 (whose code thresholds in another way, see
    `memjax.compat.sora_threshold`)
  """

  penalty: float = 1e-3

  def __post_init__(self):
    super().__post_init__()
    if self.penalty < 0:
      raise ValueError(f'penalty is {self.penalty}; below zero it would reward large gates')

  def adapt(self, matrix: Any, key: jax.Array) -> weights.Gated:
    """Returns the adapted leaf of a matrix `[m, n]`; its gates are normal."""
    gate = jax.random.normal(jax.random.fold_in(key, 1), (self.rank,), jnp.float32)
    return weights.Gated(super().adapt(matrix, key), gate)

  def optimizer(
    self, transform: optax.GradientTransformation, learning_rate: Any
  ) -> optax.GradientTransformation:
    """Returns `transform`, then the gates' proximal step."""
    transform = super().optimizer(transform, learning_rate)
    return optax.chain(transform, only('gate', soft_threshold(learning_rate, self.penalty)))


def ranks(params: Any) -> Any:
  """Returns how many gates are open, i32[...] of each gated leaf; None for others."""

  def count(leaf):
    return jnp.sum(leaf.gate != 0, axis=-1) if isinstance(leaf, weights.Gated) else None

  return jax.tree.map(count, params, is_leaf=weights.is_weight)
