"""Which leaves of an optimizer state belong to a layer, and whether a transform can go layer by
layer.

Shapes in this file: stacked parameters are `[L, ...]`; a transform that sees one layer gets them as
`[1, ...]`, with as many axes as ever, so that rules by axes and by path decide alike.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.naming import path_string
from memjax.steps import dependence
from memjax.transforms.layers import Layer

STACK = 'blocks'  # The key of the parameters that are stacked over layers.
_SHARED, _LAYER = '(shared)', '(layer)'  # Labels of state without an owner, and of the index.


class Slot(NamedTuple):
  """Where one leaf of the optimizer state belongs."""

  owner: str | None  # Path of the parameter whose path ends the leaf's own; None for counts.
  layered: bool  # Whether it is `[L, ...]` and each layer has its own part.

  @property
  def shared(self) -> bool:
    """Whether it belongs to no layer, and not to the embedding or the head either."""
    return not self.layered and (self.owner is None or _in_stack(self.owner))


def plan(transform: optax.GradientTransformationExtraArgs, params: Any) -> list[Slot]:
  """Returns one `Slot` a leaf of `transform.init(params)`, after checking that layers can be
  updated one after the other.

  They can if what becomes of a leaf needs that leaf alone: its gradient, parameter and state, and
  state that belongs to no leaf and moves by itself, such as counts. That is read off the
  transform's trace; nothing is computed.

  Args:
    transform: The transform.
    params: Arrays or shapes; `params['blocks']` is stacked.

  Raises:
    ValueError: naming the leaf and what else its update reads, or the state that has no layer axis.
  """
  params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  layers = count_layers(params)
  one_layer = lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
  one = dict(params, **{STACK: jax.tree.map(one_layer, params[STACK])})
  whole_state, state = jax.eval_shape(transform.init, params), jax.eval_shape(transform.init, one)
  _refuse_accumulation(whole_state)
  slots = _slots(whole_state, state, params, layers)
  _check_apart(transform, one, state, slots, layers)
  return slots


def count_layers(params: Any) -> int:
  """Returns the layers `L` of the stacked parameters."""
  sizes = {x.shape[:1] for x in jax.tree.leaves(params[STACK])}
  if len(sizes) != 1 or () in sizes:
    raise ValueError(f'the leaves of params[{STACK!r}] do not share a leading axis of layers')
  return sizes.pop()[0]


def take(tree: Any, index) -> Any:
  """Returns `[1, ...]`, one layer, of every `[L, ...]` leaf."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), tree)


def put(tree: Any, part: Any, index) -> Any:
  """Writes back what `take` returned; in place where `tree` is the carry of a loop."""
  write = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), index, 0)
  return jax.tree.map(write, tree, part)


def _slots(whole_state, state, params, layers) -> list[Slot]:
  """Compares the state of all layers with that of one."""
  owners = {_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  slots = []
  named = jax.tree_util.tree_leaves_with_path(whole_state)
  for (path, leaf), one in zip(named, jax.tree.leaves(state), strict=True):
    keys = _keys(path)
    owner = next((keys[i:] for i in range(len(keys)) if keys[i:] in owners), None)
    layered = (
      owner is not None
      and owner[0] == STACK
      and leaf.shape[:1] == (layers,)
      and one.shape == (1, *leaf.shape[1:])
    )
    if not layered and leaf.shape != one.shape:
      raise ValueError(
        f'optimizer state {path_string(path)} of shape {leaf.shape} does not fall into '
        f"{layers} layers: one layer's is {one.shape}; use step='whole_tree', or a transform that "
        'treats leading axes as batch'
      )
    slots.append(Slot('/'.join(owner) if owner else None, layered))
  return slots


def _refuse_accumulation(state):
  is_multi = lambda x: isinstance(x, optax.MultiStepsState)
  if any(map(is_multi, jax.tree.leaves(state, is_leaf=is_multi))):
    raise ValueError(
      'optax.MultiSteps keeps the whole gradient tree, which a layer-by-layer step does without; '
      'accumulate over micro-batches with config.accumulate'
    )


def _check_apart(transform, one, state, slots, layers):
  names = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(one)]
  # State without an owner, or without a part for each layer, may depend on its like only: all
  # layers start from the same.
  own = lambda slot: slot.owner is not None and (slot.layered or not _in_stack(slot.owner))
  owners = [slot.owner if own(slot) else _SHARED for slot in slots]
  layer = Layer(jax.ShapeDtypeStruct((), jnp.int32), layers, STACK)
  update = lambda grads, state, params, layer: transform.update(grads, state, params, layer=layer)
  labels = [*names, *owners, *names, _LAYER]
  updates, after = dependence.trace(update, (one, state, one, layer), labels, apart=_LAYER)
  is_labels = lambda x: isinstance(x, frozenset)
  for name, found in zip(names, jax.tree.leaves(updates, is_leaf=is_labels), strict=True):
    _check_leaf(f'the update of {name}', name, found)
  paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
  for path, owner, found in zip(
    paths, owners, jax.tree.leaves(after, is_leaf=is_labels), strict=True
  ):
    _check_leaf(f'optimizer state {path}', owner, found)


def _check_leaf(what, owner, found):
  others = found - {owner, _SHARED, _LAYER, dependence.NOISE}
  if others:
    raise ValueError(
      f'{what} depends on {min(others)}{" and others" if len(others) > 1 else ""}, but a '
      'layer-by-layer step never holds all gradients at once: clip by config.clip_norm in place of '
      "optax.clip_by_global_norm, or use step='whole_tree'"
    )
  if dependence.NOISE in found and _in_stack(owner):
    raise ValueError(
      f'{what} draws random numbers that would be the same in every layer; make their key depend '
      "on the extra argument `layer` (memjax.transforms.layers.Layer), or use step='whole_tree'"
    )


def _in_stack(path: str) -> bool:
  return path.split('/')[0] == STACK


def _keys(path) -> tuple[str, ...]:
  return tuple(path_string((key,)) for key in path)
