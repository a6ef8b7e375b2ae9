"""Weights that stay as they are."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax

from memjax.weights.weight import Weight, dot, materialize, take


@functools.partial(jax.tree_util.register_dataclass, data_fields=('value',), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Frozen:
  """A weight that training passes over: nothing of its size is made for it.

  A backward pass keeps the weight as it is stored, and asks it again for the product with the
  cotangents; activations are not kept for it.

  Attributes:
    value: The weight: an array, or another `Weight`, such as a quantised one.
  """

  value: jax.Array | Weight

  TRAINED: ClassVar = ()

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w[m, n]`, or `x[..., n] @ w^T`, in `x.dtype`."""
    return frozen_dot(x, self.value, transpose)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the weight."""
    return jax.lax.stop_gradient(take(self.value, ids))

  def materialize(self) -> jax.Array:
    """Returns the array that this leaf stands for, without a derivative."""
    return jax.lax.stop_gradient(materialize(self.value))

  def spread(self, entries: tuple) -> 'Frozen':
    """See `memjax.sharding.weight_shardings`."""
    return dataclasses.replace(self, value=spread(self.value, entries))


def frozen_dot(x: jax.Array, w: Any, transpose: bool = False) -> jax.Array:
  """`memjax.weights.dot` by a weight that has no derivative.

  Where the weight is an array, that is all. Where it is quantised, the matrix made for the product
  is not kept for the backward pass, which makes it again.
  """
  if isinstance(w, jax.Array):
    return dot(x, jax.lax.stop_gradient(w), transpose)
  return _dot_again(x, w, transpose)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _dot_again(x, w, transpose):
  return dot(x, w, transpose)


@_dot_again.defjvp
def _tangent(transpose, primals, tangents):
  x, w = primals
  # Of the tangent alone: the backward pass makes the matrix again from w, and has no need of x.
  again = jax.checkpoint(lambda t, w: dot(t, w, transpose))
  return dot(x, w, transpose), again(tangents[0], w)


def spread(leaf: Any, entries: tuple) -> Any:
  """Returns, for each array of a leaf, over which mesh axes each of its own axes is divided.

  Args:
    leaf: An array, a shape, or a `Weight`.
    entries: For each axis of the weight `[..., m, n]`, mesh axes as in a `PartitionSpec`.

  Returns:
    A tuple of entries in place of each array.
  """
  return leaf.spread(entries) if hasattr(leaf, 'spread') else tuple(entries)
