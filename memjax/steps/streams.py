"""Blocks in the host's memory, of which one matrix at a time visits the device.

Shapes in this file: `L` layers; a stacked leaf is `[L, ...]`, one layer of it `[1, ...]`, and a
block sees it without that axis. Matrices (`[L, m, n]`, and both arrays of one in 8 bits) live in
the host's memory; norms and biases, a thousandth of a block, stay on the device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memjax import weights
from memjax.estimators import log
from memjax.naming import path_string
from memjax.steps import offload, slices

Stacks = dict[str, Any]  # Path -> stacked leaf.


def place(shardings: dict, params: dict) -> dict:
  """Returns the shardings of parameters with the blocks' matrices moved to the host's memory."""

  def move(leaf, sharding):
    to_host = lambda tree: jax.tree.map(lambda s: s.with_memory_kind(offload.HOST), tree)
    if weights.whole(leaf).ndim < 3:
      return sharding
    if isinstance(leaf, weights.Restarted):
      # Factors stay, to be changed together at a restart.
      return dataclasses.replace(sharding, base=to_host(sharding.base))
    return to_host(sharding)

  stack = jax.tree.map(
    move, params[slices.STACK], shardings[slices.STACK], is_leaf=weights.is_weight
  )
  return {**shardings, slices.STACK: stack}


def to_host(tree: Any) -> Any:
  """Returns arrays in the host's memory, under `jit`: of one layer after the other, that is where a
  loop stacks them.
  """
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def to_device(tree: Any) -> Any:
  """Returns arrays on the device, under `jit`, laid out over a mesh as they were."""
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def flatten(tree: Any) -> dict:
  """Returns `{path: leaf}`, whole weights being leaves, by their paths within the tree."""
  leaves = jax.tree.leaves_with_path(tree, is_leaf=weights.is_weight)
  return {path_string(path): leaf for path, leaf in leaves}


def unflatten(tree: Any, leaves: dict) -> Any:
  """Returns leaves in the structure of `tree`; the opposite of `flatten`."""
  return map_leaves(lambda path, _: leaves[path], tree)


def places(tree: Any, shardings: Any) -> dict:
  """Returns `{path: sharding}` of stacked leaves, or Nones where there are no shardings."""
  return dict.fromkeys(flatten(tree)) if shardings is None else flatten(shardings)


def take(leaf: Any, sharding: Any, index: jax.Array) -> Any:
  """Returns one layer of a stacked leaf on the device, `[1, ...]`; a sharding of None says that
  it is there already.
  """
  layer = slices.take(leaf, index)
  return layer if sharding is None else jax.tree.map(offload.fetch, layer, sharding)


def put(leaf: Any, new: Any, sharding: Any, index: jax.Array) -> Any:
  """Writes what is trained of a layer back to where `take` had it from; in place in the carry of a
  loop.
  """
  old, new = weights.trained(leaf), weights.trained(new)
  if sharding is not None:
    new = jax.tree.map(offload.store, new, weights.trained(sharding))
  return weights.replaced(leaf, slices.put(old, new, index))


def fingerprint(params: dict) -> jax.Array:
  """Returns `memjax.estimators.log.fingerprint` of what is trained, under `jit`, in one pass over
  the blocks: one matrix of one layer at a time visits the device.
  """
  stacks = flatten(params[slices.STACK])

  def body(index, total):
    for path, leaf in stacks.items():
      layer = {f'{slices.STACK}/{path}': to_device(slices.take(leaf, index))}
      total += log.layer_fingerprint(_dense(layer), index)
      # One after the other: the next is fetched when this one is gone.
      total, index = lax.optimization_barrier((total, index))
    return total

  rest = {k: v for k, v in params.items() if k != slices.STACK}
  layers = slices.count_layers(params)
  return lax.fori_loop(0, layers, body, log.fingerprint(_dense(rest)))


def first_rows(tree: Any, shardings: Any, after: Any) -> tuple[dict, Any]:
  """Returns the first layer of what is trained of stacked leaves, as arrays on the device: of a
  matrix `[L, m, n]` its first row alone, `[1, 1, n]`.

  A TPU fetches no less than the matrix: a layer moves to the device, one matrix at a time.

  Args:
    tree: Stacked leaves.
    shardings: Of these, or None.
    after: What there is before the first is fetched.

  Returns:
    `{path: rows}`, and `after`, to be used in its place: a barrier holds what is used after it.
  """
  rows, index, where = {}, jnp.int32(0), places(tree, shardings)
  for path, leaf in flatten(tree).items():
    rows, index, after = lax.optimization_barrier((rows, index, after))
    layer = _dense({path: take(leaf, where[path], index)})
    rows |= jax.tree.map(lambda x: x[:, :1] if x.ndim > 2 else x, layer)
  return rows, after


def _dense(params):
  return weights.dense(weights.trained(params))


def order_of_use(block: Callable, layer: dict, x: jax.Array) -> list[str]:
  """Returns the paths of a block's matrices in the order in which it multiplies by them.

  Args:
    block: `block(layer, x)`.
    layer: One layer as shapes, without the axis of layers.
    x: Its input.
  """
  used = []

  def trace(layer, x):
    return block(map_leaves(lambda path, leaf: _Noted(leaf, path, used), layer), x)

  jax.eval_shape(trace, layer, x)
  matrices = [path for path, leaf in flatten(weights.whole(layer)).items() if leaf.ndim > 1]
  # What a block does not use must be updated too.
  return list(dict.fromkeys([path for path in used if path in matrices] + matrices))


@dataclasses.dataclass(frozen=True)
class _Noted:
  """A weight that notes when it is used."""

  value: Any
  path: str
  used: list

  def dot(self, x, transpose=False):
    self.used.append(self.path)
    return weights.dot(x, self.value, transpose)

  def take(self, ids):
    self.used.append(self.path)
    return weights.take(self.value, ids)

  def materialize(self):
    self.used.append(self.path)
    return weights.materialize(self.value)


class Visit:
  """One layer's turn on the device: its matrices arrive in the order of their use.

  A matrix is fetched while the product before its own is under way: the fetch waits until that
  product can begin, and what is made of the matrix waits until it is over. So two are on the device
  as they are stored, and one as it is used. The first of the next layer is fetched during this
  layer's last product.

  Lives for one trace of one block; `stacks` and `first` are what it leaves to the next layer.

  Args:
    order: Paths of the matrices, see `order_of_use`.
    stacks: Of the blocks, by path.
    first: The layer's first matrix, fetched already, `[1, ...]`.
    shardings: Of the stacks, by path.
    index: i32[], this layer.
    change: `change(path, leaf, index) -> leaf`, made of each leaf `[1, ...]` before it is used, and
      written back.
  """

  def __init__(self, order, stacks, first, shardings, index, change: Callable):
    self.stacks = dict(stacks)
    self._order, self._shardings, self._index, self._change = order, shardings, index, change
    self._ready, self._changed, self._product = {order[0]: first}, {}, None
    for path in stacks:
      if path not in order:
        self._ready[path] = take(stacks[path], shardings[path], index)

  @property
  def first(self) -> Any:
    """The first matrix of the next layer, fetched."""
    return self._ready[self._order[0]]

  def finish(self) -> None:
    """Changes what the block had no use for."""
    for path in self.stacks:
      if path not in self._changed:
        self.ask(path, None)

  def ask(self, path: str, x: jax.Array | None) -> tuple[Any, jax.Array | None]:
    """Returns a leaf after its change, `[1, ...]`, and `x`, to be used in its place as the input of
    the product.
    """
    if path not in self._changed:
      leaf = self._ready.pop(path)
      if path in self._order:
        x, leaf = self._begin(path, x, leaf)
      new = self._change(path, leaf, self._index)
      self.stacks[path] = put(self.stacks[path], new, self._shardings[path], self._index)
      self._changed[path] = new
    return self._changed[path], x

  def end(self, y: jax.Array) -> jax.Array:
    """Notes the result of a product, which the next waits for, and returns it."""
    self._product = lax.optimization_barrier(y)
    return self._product

  def _begin(self, path, x, leaf):
    """Lets the last product end, and fetches the matrix after this one."""
    place = self._order.index(path) + 1
    last = place == len(self._order)
    following = self._order[0 if last else place]
    layers = jax.tree.leaves(self.stacks[path])[0].shape[0]
    # Of the layer after the last there is none; fetching some other's is simpler than a condition.
    index = jnp.minimum(self._index + 1, layers - 1) if last else self._index
    x, leaf, index, _ = lax.optimization_barrier((x, leaf, index, self._product))
    self._ready[following] = take(self.stacks[following], self._shardings[following], index)
    return x, leaf


@dataclasses.dataclass(frozen=True)
class Visiting:
  """A weight of a layer whose turn it is: asked for, it comes.

  Attributes:
    visit: The layer's turn.
    path: Of the leaf, within a block.
    see: `see(path, leaf) -> weight`, what this forward pass sees of it, `[1, ...]` to `[...]`.
  """

  visit: Visit
  path: str
  see: Callable

  def dot(self, x, transpose=False):
    leaf, x = self.visit.ask(self.path, x)
    return self.visit.end(weights.dot(x, self.see(self.path, leaf), transpose))

  def take(self, ids):
    leaf, ids = self.visit.ask(self.path, ids)
    return weights.take(self.see(self.path, leaf), ids)

  def materialize(self):
    leaf, _ = self.visit.ask(self.path, None)
    return weights.materialize(self.see(self.path, leaf))


def visiting(visit: Visit, layer: dict, see: Callable) -> dict:
  """Returns a layer whose leaves are `Visiting`; of `layer`, the paths alone are read."""
  return map_leaves(lambda path, _: Visiting(visit, path, see), layer)


def map_leaves(function: Callable, tree: Any) -> Any:
  """Returns `function(path, leaf)` of every leaf, whole weights being leaves."""
  return jax.tree.map_with_path(
    lambda path, leaf: function(path_string(path), leaf), tree, is_leaf=weights.is_weight
  )
