"""Weights in the host's memory, which visit the device where they are used."""

import dataclasses
import functools
from typing import Any

import jax

from memjax.weights.weight import Weight, dot, is_weight, materialize, take


@functools.partial(jax.tree_util.register_dataclass, data_fields=('value',), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Offloaded:
  """A weight that is fetched whenever it is used, and is not kept.

  Costs its bytes over the host's bus at each use. In a loop over stacked layers that is one matrix
  at a time, and the compiler may fetch the next during the products of the last. On the device
  already, nothing moves.

  Attributes:
    value: The weight: an array, or another `Weight`.
  """

  value: jax.Array | Weight

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w[m, n]`, or with the transpose, in `x.dtype`."""
    return dot(x, fetch(self.value), transpose)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the weight; all of it is fetched."""
    return take(fetch(self.value), ids)

  def materialize(self) -> jax.Array:
    """Returns the array that this leaf stands for, on the device."""
    return materialize(fetch(self.value))


def fetch(tree: Any) -> Any:
  """Returns arrays on the device, laid out over a mesh as they were in the host's memory; under
  `jit` alone.
  """
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def offloaded(params: Any) -> Any:
  """Returns parameters any of which may be in the host's memory, as a model can read them on the
  device.

  A view that allocates nothing: `model.loss(offloaded(params), batch)` evaluates a model larger
  than the device.
  """
  return jax.tree.map(Offloaded, params, is_leaf=is_weight)
