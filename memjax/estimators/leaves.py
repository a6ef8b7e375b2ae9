"""The leaves that an estimator perturbs: their paths, layers and groups.

Shapes in this file: a stacked leaf is `[L, ...]`, or `[1, ...]` when one layer is seen at a time;
`G` groups of parameters are perturbed in turn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax import weights
from memjax.naming import path_string
from memjax.transforms.layers import Layer


class Leaf(NamedTuple):
  """One leaf of the parameters, as an estimator sees it."""

  path: str
  shape: tuple[int, ...]
  dtype: Any  # Of its estimate: f32, or f64 for f64 parameters.
  layers: jax.Array | None  # i32[l], those that it holds; None if it is not stacked.
  group: int  # Its group, or that of its first layer.
  grouped: bool  # Whether each of its layers is a group.
  trained: bool

  @property
  def matrix(self) -> bool:
    """Whether each layer of it has two axes or more."""
    return len(self.shape) - (self.layers is not None) >= 2

  def key(self, noise, root: jax.Array, draw) -> jax.Array:
    """Returns its key in a draw: `u32[k]`, or `u32[l, k]`."""
    return noise.key(root, draw, self.path, self.layers)


class Leaves:
  """All leaves in the order of `jax.tree.leaves`, with their values."""

  def __init__(self, leaves: list[Leaf], values: list, treedef, groups: int):
    self._leaves, self.values, self._treedef, self.groups = leaves, values, treedef, groups

  def __iter__(self):
    return iter(self._leaves)

  def __len__(self):
    return len(self._leaves)

  @property
  def dtype(self):
    """Of values and slopes: the widest of the leaves', and f32 at least."""
    return jnp.result_type(jnp.float32, *[leaf.dtype for leaf in self._leaves])

  def tree(self, parts: list) -> Any:
    """Returns a tree like the parameters; a None stays one."""
    return self._treedef.unflatten(parts)

  def list(self, tree: Any) -> list:
    """Returns the parts of such a tree, Nones included."""
    return self._treedef.flatten_up_to(tree)


def describe(
  params: Any,
  stack: str,
  blockwise: bool,
  targets: Callable[[str], bool] | None,
  layer: Layer | None = None,
) -> Leaves:
  """Describes the leaves of parameters.

  Args:
    params: Tree of arrays or `memjax.weights.Weight`s.
    stack: First key of the stacked leaves. A list of layers under it is no stack, nor are layers
      whose keys are numbers: `blocks/0/kernel` is a leaf like any other.
    blockwise: Whether each layer and each other first key is a group of its own.
    targets: Says of a path whether the leaf is trained; None is all.
    layer: The layer that stacked leaves hold, `[1, ...]`; None if they hold all.

  Raises:
    ValueError: if no leaf is trained; for one that is and holds no floating-point numbers; if
      leaves are stacked over different numbers of layers, each of which is to be a group.
  """
  named, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=weights.is_weight)
  leaves, values, groups, counts, first = [], [], {}, {}, 0
  for path, value in named:
    path = path_string(path)
    top, _, below = path.partition('/')
    value = value if hasattr(value, 'shape') or weights.is_weight(value) else jnp.asarray(value)
    shape, dtype = _shape(value)
    layers = None
    if top == stack and len(shape) and not below.partition('/')[0].isdigit():
      layers = jnp.arange(shape[0]) if layer is None else layer.index[None]
    count = 1 if layers is None else shape[0] if layer is None else layer.count
    trained = targets is None or bool(targets(path))
    if trained and not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f'{path}: {dtype} cannot be perturbed by a little; leave it out with `targets`, or keep '
        'what is not trained out of the parameters'
      )
    if top not in groups:
      groups[top], counts[top], first = first, count, first + count
    if blockwise and count != counts[top]:
      raise ValueError(
        f'{path}: {count} layers, but leaves before it under {top!r} have {counts[top]}; blockwise '
        'perturbs one layer of them all at a time, so stack as many in each'
      )
    leaves.append(
      Leaf(
        path,
        shape,
        jnp.promote_types(dtype, jnp.float32),
        layers,
        group=groups[top] if blockwise else 0,
        grouped=blockwise and layers is not None,
        trained=trained,
      )
    )
    values.append(value)
  if leaves and not any(leaf.trained for leaf in leaves):
    paths = ', '.join(leaf.path for leaf in leaves[:3])
    raise ValueError(f'targets chooses none of the {len(leaves)} leaves ({paths}, ...)')
  return Leaves(leaves, values, treedef, first if blockwise else 1)


def group_scales(leaf: Leaf, scales: jax.Array) -> jax.Array:
  """Returns the scale of a leaf, `[]` or one a layer `[l]`, of the scales of groups `[G]`."""
  if leaf.layers is None:
    return scales[leaf.group]
  if not leaf.grouped:
    return jnp.broadcast_to(scales[leaf.group], leaf.layers.shape)
  return jnp.take(scales, leaf.group + leaf.layers)


def _shape(value):
  if weights.is_weight(value):
    value = weights.whole(value)
  return tuple(np.shape(value)), jnp.result_type(value)
