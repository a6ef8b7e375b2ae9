"""Weights plus noise that is never written: what a forward pass sees of `w + scale * z`.

Shapes in this file: a weight is `[..., m, n]`, any leading axes one of layers; `r` is the rank of
low-rank noise. Nothing here knows where keys come from, or which noise they give.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from memjax.weights.weight import Weight, dot, is_weight, materialize, take


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('value', 'key', 'scale'), meta_fields=('noise',)
)
@dataclasses.dataclass(frozen=True)
class Perturbed:
  """A weight plus dense noise, drawn wherever the weight is used and again the next time.

  Costs the noise of one matrix of one layer while that is used, and of a lookup only that of the
  rows looked up. The sum is formed in f32 and is rounded once, to the dtype of the product.

  Attributes:
    value: The weight: an array, or another `Weight`.
    key: `u32[..., k]`, with the leading axis of layers if the weight is stacked.
    scale: `f32[...]`, likewise; what the noise is multiplied by. A derivative with respect to it is
      one along the noise.
    noise: Has `draw(key, shape)` and `rows(key, ids, width)`, as `memjax.estimators.noise.Noise`;
      hashable.
  """

  value: jax.Array | Weight
  key: jax.Array
  scale: jax.Array
  noise: Any

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ (w + scale z)[m, n]`, or with the transpose, in `x.dtype`."""
    return dot(x, _row_major(self._sum(materialize(self.value)).astype(x.dtype)), transpose)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the sum, drawing the noise of these alone."""
    rows = take(self.value, ids)
    noise = self.noise.rows(self.key, ids, rows.shape[-1])
    return _add(rows, self.scale, noise).astype(rows.dtype)

  def materialize(self) -> jax.Array:
    """Returns the sum `[..., m, n]`, in the dtype of the weight."""
    value = materialize(self.value)
    return self._sum(value).astype(value.dtype)

  def _sum(self, value):
    return _add(value, self.scale, self.noise.draw(self.key, value.shape))


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('value', 'left', 'right', 'scale'), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A weight plus a product of thin factors that is never formed: `x w + scale (x left) right^T`.

  On a CPU costs a copy of the matrix while that is used, with its factors joined to it. Factors of
  another shape `[a, r]` and `[b, r]` with `a b = m n` stand for their product, reshaped; it is then
  formed where the weight is used.

  Attributes:
    value: The weight: an array, or another `Weight`.
    left: `f32[..., m, r]`, an m-side of the noise.
    right: `f32[..., n, r]`, its n-side.
    scale: `f32[...]`.
  """

  value: jax.Array | Weight
  left: jax.Array
  right: jax.Array
  scale: jax.Array

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w + scale (x @ left) @ right^T`, or with the transpose, in `x.dtype`."""
    if self._reshaped:
      return dot(x, self.materialize().astype(x.dtype), transpose)
    into, out = (self.right, self.left) if transpose else (self.left, self.right)
    thin = dot(x, into) * self.scale.astype(x.dtype)
    value = self.value if is_weight(self.value) else _row_major(self.value)
    added = dot(x, value, transpose) + dot(thin, out, transpose=True)
    if is_weight(self.value):
      return added
    # Of the two the compiler keeps one.
    joined = lambda added: _joined(x, self.value, thin, out, transpose)
    return jax.lax.platform_dependent(added, cpu=joined, default=lambda added: added)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the sum."""
    if self._reshaped:
      return take(self.materialize(), ids)
    rows = take(self.value, ids)
    return _add(rows, self.scale, dot(take(self.left, ids), self.right, True)).astype(rows.dtype)

  def materialize(self) -> jax.Array:
    """Returns the sum `[..., m, n]`, in the dtype of the weight."""
    value = materialize(self.value)
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    left, right = self.left.astype(dtype), self.right.astype(dtype)
    product = jnp.einsum('...mr,...nr->...mn', left, right)
    return _add(value, self.scale, product.reshape(value.shape)).astype(value.dtype)

  @property
  def _reshaped(self):
    value = jax.eval_shape(materialize, self.value)
    return (self.left.shape[-2], self.right.shape[-2]) != value.shape[-2:]


def _joined(x, value, thin, out, transpose):
  """The same by one product, `[x thin] @ [value; out^T]`: copying both sides takes a CPU less time
  than adding the result of a second one.
  """
  out, axis = (out, 1) if transpose else (out.T, 0)
  both = jnp.concatenate([value.astype(x.dtype), out.astype(x.dtype)], axis)
  return dot(jnp.concatenate([x, thin], -1), both, transpose)


def _row_major(x):
  """Keeps the layout in which a product would like its weight from that of all layers together,
  which a TPU's compiler would then copy whole before the loop over layers.
  """
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _add(value, scale, noise):
  """`value + scale * noise` in f32, or f64 if the value is."""
  dtype = jnp.promote_types(value.dtype, jnp.float32)
  scale = scale.astype(dtype).reshape(scale.shape + (1,) * (noise.ndim - scale.ndim))
  return value.astype(dtype) + scale * noise.astype(dtype)
