"""When the units of a stack get new bases.

A unit is one matrix of a leaf `[..., m, n]`; all units of a parameter tree are numbered through.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms.targets import Plan


class Clock(NamedTuple):
  """What the units of one leaf are told of the time."""

  plan: Plan
  first: Any  # First unit within its leaf: an int, or i32[] where a layer is sliced out.
  count: jax.Array  # i32[], updates before this one.
  refresh_every: Any  # An int, or an i32[].
  stagger: bool

  def slot(self, unit):
    """Update within a period, `0 <= slot < refresh_every`, in which a unit of the leaf is due."""
    if not self.stagger:
      return jnp.zeros_like(unit)
    return (self.plan.first + self.first + unit) * self.refresh_every // self.plan.total


class Interval(NamedTuple):
  """Which units are due; decides on state of their own, `[...]` or `[..., k]` a leaf."""

  # (leaf, plan, refresh_every) -> arrays to keep, one entry or row a unit.
  init: Callable[..., tuple[jax.Array, ...]]
  # (clock, those arrays [units, ...]) -> low, high, order: units `order[low:high]` are due, or
  # `range(low, high)` if order is None.
  due: Callable[..., tuple[Any, Any, jax.Array | None]]
  # (clock, unit, its own arrays, old basis [m, r], new) -> its arrays.
  after: Callable[..., tuple[jax.Array, ...]]
  # One tree for each array -> field of the state.
  field: Callable[..., Any] = optax.EmptyState


def fixed() -> Interval:
  """Every unit is due once in `refresh_every` updates; keeps no state."""

  def due(clock, held):
    del held
    plan, count, every = clock.plan, clock.count, clock.refresh_every
    slot = count % every
    if clock.stagger:
      # Units in slot `s` are those with `s total / every <= u < (s + 1) total / every`, which are
      # neighbours in every leaf.
      offset = plan.first + clock.first
      low = -(-slot * plan.total // every) - offset
      high = -(-(slot + 1) * plan.total // every) - offset
      low, high = jnp.where(count == 0, 0, low), jnp.where(count == 0, plan.units, high)
    else:
      low, high = 0, jnp.where(slot == 0, plan.units, 0)
    return jnp.clip(low, 0, plan.units), jnp.clip(high, 0, plan.units), None

  return Interval(
    init=lambda leaf, plan, refresh_every: (),
    due=due,
    after=lambda clock, unit, held, old, new: held,
  )


class LazyState(NamedTuple):
  """State of `lazy`; leaves without a basis have `optax.MaskedNode()`."""

  interval: optax.Updates  # i32[...], updates between two bases of a unit.
  due: optax.Updates  # i32[...], the count at which it gets the next.
  similarity: optax.Updates  # f32[..., k], of its last bases to their predecessors, oldest first.


def lazy(threshold: float = 0.4, growth: float = 2, history: int = 5) -> Interval:
  r"""Lets units whose subspace has come to rest refresh less and less often.

  A unit starts with `refresh_every`. At each refresh the cosine between the leading vectors of its
  old and its new basis is noted, without its sign, which is arbitrary; once `history` of them
  average `threshold` or more, the unit's interval grows by `growth`, and notes start afresh. Keeps
  `2 + history` numbers a unit.

  Args:
    threshold: Mean cosine from which a subspace counts as resting.
    growth: Factor on the interval.
    history: Refreshes that are averaged.

  Raises:
    ValueError: for a growth below 1 or a history of none.

  References:
    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
    Gradients <https://arxiv.org/abs/2407.08296>`_, 2024
  """
  if growth < 1 or history < 1:
    raise ValueError(
      f'lazy intervals need growth >= 1 and history >= 1, got growth={growth}, history={history}'
    )
  none = -float(history)  # Of a refresh to come: keeps the mean below 0, yet finite.

  def init(leaf, plan, refresh_every):
    units = leaf.shape[:-2]
    return (
      jnp.broadcast_to(jnp.asarray(refresh_every, jnp.int32), units),
      jnp.zeros(units, jnp.int32),
      jnp.full((*units, history), none),
    )

  def due(clock, held):
    waiting = held[1] > clock.count
    return 0, jnp.sum(~waiting), jnp.argsort(waiting, stable=True)

  def after(clock, unit, held, old, new):
    interval, _, notes = held
    leading = old[:, 0] @ new[:, 0]
    size = jnp.linalg.norm(old[:, 0]) * jnp.linalg.norm(new[:, 0])
    cosine = jnp.abs(leading) / jnp.where(size > 0, size, 1)
    noted = jnp.append(notes[1:], cosine.astype(notes.dtype))
    resting = jnp.mean(noted) >= threshold
    grown = jnp.where(resting, (interval * growth).astype(jnp.int32), interval)
    # The first bases, all found in the first update, have no predecessors; the second are spread.
    slot = clock.slot(unit)
    second = jnp.where(slot > 0, slot, clock.refresh_every)
    first = clock.count == 0
    return (
      jnp.where(first, interval, grown),
      jnp.where(first, second, clock.count + grown).astype(jnp.int32),
      jnp.where(first | resting, none, noted),
    )

  return Interval(init, due, after, LazyState)


def refreshes_before(clock: Clock) -> jax.Array:
  """How often each unit, i32[units], has been due at `fixed` intervals up to and with this update.

  Constant between two of its turns; the first update does not count as one.
  """
  slots = clock.slot(jnp.arange(clock.plan.units, dtype=jnp.int32))
  return (clock.count + clock.refresh_every - slots) // clock.refresh_every
