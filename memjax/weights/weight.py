"""The three questions a model asks of a parameter leaf, and the protocol of a leaf that answers
them itself.

Shapes in this file: a weight is `[m, n]`, activations are `[..., m]`. The leading layer axis of
stacked blocks is gone by the time a model asks, because `lax.scan` and `vmap` take it off every
array inside a leaf.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class Weight(Protocol):
  """A parameter leaf that knows how to multiply.

  Make it a frozen dataclass registered with `jax.tree_util.register_dataclass`, whose array fields
  all carry the layer axis when the leaf is stacked: then it passes through `jax.tree`, `jit`,
  `scan`, `grad` and sharding like any pytree. To nest, an implementation asks its own parts through
  `memjax.weights.dot`, never with `@`.
  """

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w[m, n]`, or `x[..., n] @ w^T`, in `x.dtype`."""

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the weight: `[*ids.shape, n]`."""

  def materialize(self) -> jax.Array:
    """Returns the array that this leaf stands for."""


def is_weight(x: Any) -> bool:
  """Whether `x` answers for itself; meant as `is_leaf` when mapping over a tree of parameters.

  >>> import jax.numpy as jnp
  >>> is_weight({'kernel': jnp.ones((2, 3))}), is_weight(jnp.ones((2, 3)))
  (False, False)
  """
  return isinstance(x, Weight) and not isinstance(x, type)


def dot(x: jax.Array, w: jax.Array | Weight, transpose: bool = False) -> jax.Array:
  """Multiplies activations by a weight.

  An array is cast to `x.dtype` first, so f32 parameters cost a 16-bit copy of one matrix at a time,
  and their gradient comes back in f32.

  Args:
    x: Activations `[..., m]`, or `[..., n]` with `transpose`.
    w: Array `[m, n]`, or a `Weight`.
    transpose: Multiplies by `w^T` instead, without forming it: a head tied to its embedding `[V,
      D]`.

  Returns:
    `[..., n]`, or `[..., m]` with `transpose`, in `x.dtype`.

  Raises:
    ValueError: when the sizes to be summed over differ, naming both shapes.

  >>> import jax.numpy as jnp
  >>> dot(jnp.ones((4, 2)), jnp.ones((2, 3))).shape
  (4, 3)
  >>> dot(jnp.ones((4, 3)), jnp.ones((2, 3)), transpose=True).shape
  (4, 2)
  """
  if is_weight(w):
    return w.dot(x, transpose)
  axis = 1 if transpose else 0
  if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[axis]:
    raise ValueError(
      f'dot: cannot multiply x {x.shape} by w {w.shape}{" transposed" if transpose else ""}: '
      f'the last axis of x must equal axis {axis} of a two-dimensional w. '
      'Stacked layers [L, m, n] go through lax.scan or vmap first.'
    )
  contract = ((x.ndim - 1,), (axis,))
  return jax.lax.dot_general(x, w.astype(x.dtype), (contract, ((), ())))


def take(w: jax.Array | Weight, ids: jax.Array) -> jax.Array:
  """Looks up rows of a weight.

  Args:
    w: Array `[m, n]`, or a `Weight`.
    ids: Integers below `m`, of any shape. One at or above `m` gives a row of NaN, so that a
      tokenizer with too large a vocabulary shows up in the first loss instead of training on the
      wrong row.

  Returns:
    `[*ids.shape, n]`, in the dtype of `w`.

  Raises:
    ValueError: when `w` is not a matrix or `ids` are not integers.

  >>> import jax.numpy as jnp
  >>> take(jnp.array([[0.0, 1.0], [2.0, 3.0]]), jnp.array([1])).tolist()
  [[2.0, 3.0]]
  """
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(f'take: ids must be integers, got {ids.dtype}{list(ids.shape)}.')
  if is_weight(w):
    return w.take(ids)
  if w.ndim != 2:
    raise ValueError(f'take: w {w.shape} is not a matrix; ids {ids.shape} index its rows.')
  return jnp.take(w, ids, axis=0, mode='fill')


def whole(params: Any) -> Any:
  """Returns the shapes of the arrays that leaves stand for: a tree of `jax.ShapeDtypeStruct`s."""
  return jax.tree.map(lambda w: jax.eval_shape(materialize, w), params, is_leaf=is_weight)


def materialize(w: jax.Array | Weight) -> jax.Array:
  """Returns the array that a leaf stands for; an array is returned as it is.

  For code that needs numbers (norms, export, tests). In a model it would cost the memory that the
  leaf saves.
  """
  return w.materialize() if is_weight(w) else w
