"""LoRA: what is added to a frozen matrix is the product of two thin ones."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memjax import weights
from memjax.adapters.noise import with_keys
from memjax.adapters.rates import only
from memjax.naming import nearest
from memjax.weights import forms

INITS = ('kaiming', 'gaussian')


@dataclasses.dataclass(frozen=True)
class LoRA:
  """`W + s A B` with `s = alpha / rank`, for `memjax.adapters.attach`.

  A is drawn, B is zero, so that training begins at W. State of an optimizer with two moments is
  `2 r (m + n)` numbers a matrix, gradients half of that.

  Attributes:
    rank: r.
    alpha: Numerator of the scale; the default, 0, means the rank, hence a scale of 1.
    targets: Regular expression searched in leaf paths; '' the layers' matrices.
    rest: Likewise, of what is trained beside the adapters; '' nothing, '.*' everything, 'bias' as
      published with `bias='all'`.
    rank_stabilized: Scales by `alpha / sqrt(rank)`.
    dropout: Fraction of the activations that the addition does not see in training: another mask
      each micro-batch. `memjax.adapters.over_time` gives leaves the key of each update; a loop of
      one's own calls `memjax.adapters.with_keys`, else one mask stays.
    init: 'kaiming' draws A uniformly within `1 / sqrt(m)`, as the official code; 'gaussian' with
      standard deviation `1 / rank`.
    dtype: Of the factors; '' is that of the matrix.
    rate_ratio: Learning rate of B over that of A, as in LoRA+; 16 is published.
    form: In what order to multiply, a key of `memjax.weights.forms.NAMED`; '' counts operations,
      and does not merge in 16 bits, where the sum would be rounded.

  References:
    Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021; Kalajdzievski, `rsLoRA
    <https://arxiv.org/abs/2312.03732>`_, 2023; Hayou et al., `LoRA+
    <https://arxiv.org/abs/2402.12354>`_, 2024
  """

  rank: int
  alpha: float = 0.0
  targets: str = ''
  rest: str = ''
  rank_stabilized: bool = False
  dropout: float = 0.0
  init: str = 'kaiming'
  dtype: str = ''
  form: str = ''
  rate_ratio: float = 1.0

  def __post_init__(self):
    if self.init not in INITS:
      raise ValueError(f'init is {self.init!r}, not one of {", ".join(INITS)}')
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout is {self.dropout}, not a fraction below 1')
    if self.rate_ratio <= 0:
      raise ValueError(f'rate_ratio is {self.rate_ratio}; B would not learn, or unlearn')
    if self.form and self.form not in forms.NAMED:
      raise ValueError(f'form {self.form!r} does not exist; {nearest(self.form, forms.NAMED)}')
    if self.form not in ('', 'split') and self.dropout:
      raise ValueError(
        f'form is {self.form!r} and dropout {self.dropout}, but what the addition sees less of it '
        "multiplies apart; set form='' or dropout=0"
      )

  @property
  def scale(self) -> float:
    """What the product of the factors is multiplied by."""
    alpha = self.alpha or self.rank
    return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

  def adapt(self, matrix: Any, key: jax.Array) -> weights.Adapted:
    """Returns the adapted leaf of a matrix `[m, n]`."""
    shape = weights.whole(matrix)
    m, n = shape.shape
    dtype = jnp.dtype(self.dtype or shape.dtype)
    return weights.Adapted(
      base=matrix,
      a=draw_a(key, m, self.rank, self.init).astype(dtype),
      b=jnp.zeros((self.rank, n), dtype),
      key=jnp.zeros(2, jnp.uint32) if self.dropout else None,
      scale=self.scale,
      dropout=self.dropout,
      form=forms.NAMED.get(self.form),
    )

  def optimizer(
    self, transform: optax.GradientTransformation, learning_rate: Any
  ) -> optax.GradientTransformation:
    """Returns `transform` with its updates of B at their own rate."""
    del learning_rate
    if self.rate_ratio == 1:
      return transform
    return optax.chain(transform, only('b', optax.scale(self.rate_ratio)))

  def advance(self, state: dict, key: jax.Array) -> dict:
    """Returns the training state with this step's noise."""
    if not self.dropout:
      return state
    key = jax.random.fold_in(key, state['step'])
    return {**state, 'params': with_keys(state['params'], key)}


def draw_a(key: jax.Array, m: int, rank: int, init: str = 'kaiming') -> jax.Array:
  """Returns a first factor `f32[m, r]`."""
  if init == 'gaussian':
    return jax.random.normal(key, (m, rank), jnp.float32) / rank
  bound = 1 / math.sqrt(m)
  return jax.random.uniform(key, (m, rank), jnp.float32, -bound, bound)
