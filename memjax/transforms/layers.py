"""What a transform is told when it sees one layer of stacked leaves at a time.

Shapes in this file: a stacked leaf is `[L, ...]`, one layer of it `[1, ...]`.
"""

import dataclasses
import functools
from typing import Any

import jax

from memjax.naming import path_string


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('index',), meta_fields=('count', 'stack')
)
@dataclasses.dataclass(frozen=True)
class Layer:
  """Extra argument `layer` of `update`: the leaves under `stack` are `[1, ...]`, one layer of `[L,
  ...]`.

  A transform whose arithmetic treats leading axes as batch needs none of it. One that numbers its
  matrices, or draws noise for them, does so as if it saw all layers: number `index * k + i` for the
  `i`-th of the `k` matrices that a layer's leaf holds.

  Attributes:
    index: i32[], the layer.
    count: Layers `L`.
    stack: First key of the stacked leaves' paths.
  """

  index: jax.Array
  count: int
  stack: str

  def holds(self, path: str) -> bool:
    """Whether the leaf at `path` is a layer of a stack.

    >>> Layer(jax.numpy.int32(3), 8, 'blocks').holds('blocks/attn/q/kernel')
    True
    """
    return path.split('/')[0] == self.stack

  def whole(self, tree: Any) -> Any:
    """Returns `tree` as shapes, with all `L` layers in the stacked leaves."""

    def restack(path, leaf):
      held = self.holds(path_string(path))
      shape = (self.count, *leaf.shape[1:]) if held else leaf.shape
      return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(restack, tree)
