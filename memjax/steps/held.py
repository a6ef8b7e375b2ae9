"""How a layer-by-layer step holds the optimizer state, of which it sees one unit at a time.

Shapes in this file: `L` layers. A unit is what is updated at once: the embedding, one layer, or
what the head reads. A state leaf of the layers is `[S, ...]`, with a slot for each of the `L`
layers, or only for those whose turn it is; the transform sees one layer of it, `[1, ...]`. State
that belongs to no parameter, or to a layer's without having the axis of layers, is called shared:
counts, keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.steps import offload, slices
from memjax.steps.backward import EMBED


class Unit(NamedTuple):
  """What is updated at once."""

  names: tuple[str, ...]  # First keys of its parameters.
  index: jax.Array | None  # i32[], the layer; None for the embedding and the head.
  slot: jax.Array | None  # i32[], the layer's place in the state's leaves.

  def owns(self, owner: str | None) -> bool:
    """Whether state of this owner (a path, or None) is this unit's alone."""
    return owner is not None and owner.split('/')[0] in self.names


class Holder(NamedTuple):
  """Takes a unit's state out of the leaves of all state, and puts it back."""

  # (leaves, unit, fresh) -> the leaves that the transform sees; `fresh()` are those of its `init`.
  take: Callable
  # (leaves, new, unit) -> leaves; in place where they are a loop's carry.
  put: Callable


def together(slots: list[slices.Slot], where: list) -> Holder:
  """State of units that are all updated in every step: shared state moves once a step.

  Args:
    slots: Of the leaves, see `slices.plan`.
    where: Their shardings, or Nones.
  """

  def take(leaves, unit, fresh):
    del fresh

    def see(slot, x, place):
      return x if slot.shared else _take_own(slot, x, place, unit)

    return [see(*each) for each in zip(slots, leaves, where, strict=True)]

  def put(leaves, new, unit):
    def replace(slot, old, new, place):
      if slot.shared:
        # Every unit starts from the old one, so that it moves with the last.
        return new if EMBED in unit.names else old
      return _put_own(slot, old, new, place, unit)

    return [replace(*each) for each in zip(slots, leaves, new, where, strict=True)]

  return Holder(take, put)


def apart(slots: list[slices.Slot], where: list, size: int, renew=None) -> Holder:
  """State of units that take turns: each has shared state of its own, `[S + 2, ...]`, in the order
  embedding, slots, head. A leaf that is None is not kept from one step to the next.

  Args:
    slots: Of the leaves, see `slices.plan`.
    where: Their shardings, or Nones.
    size: Slots `S`.
    renew: bool[], whether units start anew in this step; None if they never do.
  """

  def take(leaves, unit, fresh):
    def see(slot, x, place, new):
      if slot.shared:
        x = lax.dynamic_index_in_dim(x, _row(unit, size), keepdims=False)
      elif x is None:
        return new
      else:
        x = _take_own(slot, x, place, unit)
      return x if renew is None else jnp.where(renew, new, x)

    return [see(*each) for each in zip(slots, leaves, where, fresh(), strict=True)]

  def put(leaves, new, unit):
    def replace(slot, old, new, place):
      if slot.shared:
        return lax.dynamic_update_index_in_dim(old, new, _row(unit, size), 0)
      return old if old is None else _put_own(slot, old, new, place, unit)

    return [replace(*each) for each in zip(slots, leaves, new, where, strict=True)]

  return Holder(take, put)


def init_apart(slots: list[slices.Slot], leaves: list, size: int, ends: bool) -> list:
  """Returns the leaves of `transform.init`, on `S` layers, as `apart` holds them; `ends` says
  whether embedding and head have state.
  """

  def hold(slot, x):
    if slot.shared:
      return jnp.broadcast_to(x, (size + 2, *x.shape))
    return x if slot.layered or ends else None

  return [hold(*each) for each in zip(slots, leaves, strict=True)]


def _take_own(slot, x, place, unit):
  if not unit.owns(slot.owner):
    # Used by nothing; the transform wants something in its place.
    return jnp.zeros((1, *x.shape[1:]) if slot.layered else x.shape, x.dtype)
  return offload.fetch(slices.take(x, unit.slot) if slot.layered else x, place)


def _put_own(slot, old, new, place, unit):
  if not unit.owns(slot.owner):
    return old
  new = offload.store(new.astype(old.dtype), place)
  return slices.put(old, new, unit.slot) if slot.layered else new


def _row(unit: Unit, size: int) -> Any:
  if unit.index is not None:
    return unit.slot + 1
  return 0 if EMBED in unit.names else size + 1
