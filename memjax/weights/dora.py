"""Adapted weights whose columns have a length of their own: direction and magnitude apart.

Shapes in this file: a weight is `[m, n]`, its factors `A[m, r]` and `B[r, n]`, a number for each
column `[n]`; stacked leaves have an axis of layers in front of all.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from memjax.weights.adapted import Adapted, Around
from memjax.weights.weight import Weight, dot, materialize


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('adapted', 'magnitude', 'square'), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class DoRA(Around):
  """`V diag(g / |V|)` with `V = W + s A B`: each column of V, at a trained length.

  Lengths of V are constants to a derivative, as published, and they are had without V: `r` products
  with W and `n r` numbers at a time. Memory: `2 n` numbers beside the factors.

  Attributes:
    adapted: V.
    magnitude: g: f32[..., n].
    square: Squared lengths of W's columns, f32[..., n].

  References:
    Liu et al., `DoRA: Weight-Decomposed Low-Rank Adaptation <https://arxiv.org/abs/2402.09353>`_,
    2024
  """

  adapted: Adapted
  magnitude: jax.Array | Weight
  square: jax.Array

  TRAINED: ClassVar = ('adapted', 'magnitude')

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w[m, n]`, or `x[..., n] @ w^T`, in `x.dtype`."""
    if transpose:
      return self.adapted.dot(_columns(x, self._gain()), transpose)
    return _columns(self.adapted.dot(x), self._gain())

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the weight."""
    return _columns(self.adapted.take(ids), self._gain())

  def materialize(self) -> jax.Array:
    """Returns the array `[..., m, n]` that this leaf stands for, in the dtype of W."""
    base = jax.lax.stop_gradient(materialize(self.base))
    return (base.astype(jnp.float32) + self.delta()).astype(base.dtype)

  def delta(self) -> jax.Array:
    """Returns what is added to W: `f32[..., m, n]`."""
    base = jax.lax.stop_gradient(materialize(self.base)).astype(jnp.float32)
    return (base + self.adapted.delta()) * self._gain()[..., None, :] - base

  def spread(self, entries: tuple) -> 'DoRA':
    """See `memjax.sharding.weight_shardings`."""
    *batch, _, n = entries
    columns = (*batch, n)
    return DoRA(self.adapted.spread(entries), columns, columns)

  def _gain(self):
    lengths = column_lengths(self.adapted, self.square)
    # A column of zeros has no direction to be scaled.
    return materialize(self.magnitude) / jnp.where(lengths == 0, 1, lengths)


def column_squares(w: Any) -> jax.Array:
  """Returns the squared lengths of a weight's columns, f32[..., n]."""
  return jnp.sum(jnp.square(materialize(w).astype(jnp.float32)), axis=-2)


def column_lengths(adapted: Adapted, square: jax.Array) -> jax.Array:
  """Returns the lengths of the columns of `W + s A B`, f32[..., n], without their derivative.

  `|w|^2 + 2 s (w' A) b + s^2 b' A' A b` for columns `w` of W and `b` of B: W is asked for a product
  with r rows, and the sum is never formed.

  Args:
    adapted: The sum.
    square: Squared lengths of W's columns, f32[..., n].
  """
  a, b = (jax.lax.stop_gradient(materialize(x)) for x in (adapted.a, adapted.b))
  of_base = functools.partial(_across, jax.eval_shape(materialize, adapted.base).dtype)
  for _ in range(a.ndim - 2):
    of_base = jax.vmap(of_base)
  across = jax.lax.stop_gradient(of_base(a, adapted.base))
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  inner = jnp.einsum('...mr,...ms->...rs', a, a)
  both = 2 * across + adapted.scale * jnp.einsum('...rs,...sn->...rn', inner, b)
  total = square + adapted.scale * jnp.sum(both * b, axis=-2)
  return jnp.sqrt(jnp.maximum(total, 0))


def _across(dtype, a, base):
  """`A' W`, f32[r, n]."""
  return dot(a.T.astype(dtype), base).astype(jnp.float32)


def _columns(x, gain):
  gain = jnp.expand_dims(gain, range(x.ndim - 1))
  return (x.astype(jnp.float32) * gain).astype(x.dtype)
