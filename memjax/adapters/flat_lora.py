"""Flat-LoRA: factors that are right for all weights nearby."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.adapters.lora import LoRA
from memjax.adapters.noise import with_keys
from memjax.estimators import noise
from memjax.weights.dora import column_squares


@dataclasses.dataclass(frozen=True)
class FlatLoRA(LoRA):
  r"""`W + s A B`, trained at `W + s A B + E` with noise E, for `memjax.adapters.attach`.

  Column `j` of E has the standard deviation :math:`f(t) \rho \|w_j\| / \sqrt{m}` with :math:`f(t) =
  (1 - \cos \pi t / T) / 2`, another draw each step. Nothing of E is kept, so that W does not drift;
  `n` numbers a matrix are, its columns' squared lengths. Time: two draws of `m n` numbers.

  Attributes:
    rho: Published: 0.05 for language models, 0.15 for vision, 0.1 for diffusion.
    steps: T, updates until the noise is at its largest; the run's.

  References:
    Li et al., `Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape
    <https://arxiv.org/abs/2409.14396>`_, 2024 (whose code counts micro-batches, adds the noise to W
    and takes it off again)
  """

  rho: float = 0.05
  steps: int = 1000

  def __post_init__(self):
    super().__post_init__()
    if self.rho <= 0 or self.steps < 1:
      raise ValueError(f'rho {self.rho} and steps {self.steps} must be above zero')

  def adapt(self, matrix: Any, key: jax.Array) -> weights.Flat:
    """Returns the adapted leaf of a matrix `[m, n]`."""
    strength, noise_key = jnp.zeros((), jnp.float32), jnp.zeros(2, jnp.uint32)
    square = column_squares(matrix)
    normal = noise.family('gaussian')
    return weights.Flat(super().adapt(matrix, key), square, strength, noise_key, normal)

  def strength(self, step: jax.Array) -> jax.Array:
    """Returns `f(t) rho` of a count of finished updates, f32[]."""
    share = jnp.clip(jnp.asarray(step, jnp.float32) / self.steps, 0, 1)
    return self.rho * 0.5 * (1 - jnp.cos(jnp.pi * share))

  def advance(self, state: dict, key: jax.Array) -> dict:
    """Returns the training state with this step's noise."""
    strength = self.strength(state['step'])

    def set_strength(leaf):
      if not isinstance(leaf, weights.Flat):
        return leaf
      return dataclasses.replace(leaf, strength=jnp.broadcast_to(strength, leaf.strength.shape))

    params = with_keys(state['params'], jax.random.fold_in(key, state['step']))
    return {**state, 'params': jax.tree.map(set_strength, params, is_leaf=weights.is_weight)}
