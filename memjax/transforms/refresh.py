"""New bases for the units of one leaf that are due.

Shapes in this file: a matrix leaf is `[..., m, n]`, a unit one of its matrices; `r` is the rank.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.naming import fold_in_path
from memjax.transforms import moments as moments_lib
from memjax.transforms.bases import PRECISION, Basis
from memjax.transforms.intervals import Clock, Interval
from memjax.transforms.storage import Storage, unpack
from memjax.transforms.units import at_least_float32


class Held(NamedTuple):
  """What a leaf's state holds that changes with its bases; every array `[..., *]` over units."""

  left: tuple[jax.Array, ...]  # A basis `[..., m, r]` as stored; () if there is none.
  right: tuple[jax.Array, ...]  # `[..., r, n]`.
  interval: tuple[jax.Array, ...]
  moments: dict[Any, jax.Array]  # Of the inner transform, by any key.


class Ways(NamedTuple):
  """The choices that a refresh depends on."""

  basis: Basis
  storage: Storage
  interval: Interval


def refresh(
  ways: Ways, clock: Clock, gradient, held: Held, kinds: dict, key, when=None, along=None
) -> Held:
  """Gives the units of one leaf that are due new bases, one matrix at a time.

  A loop with bounds known at run time only: no trip, no cost. A `cond` would carry both versions of
  the stacked bases, and a `vmap` would turn it into a `select` that refreshes every layer always.

  Args:
    ways: How bases are found, kept and timed.
    clock: Which leaf, and when.
    gradient: `[..., m, n]`.
    held: What depends on the bases.
    kinds: For each key of `held.moments` `'linear'` or `'square'`.
    key: Noise key of this update.
    when: bool[], False for no refresh even of what is due; None for True.
    along: Function of (basis `[d, r]`, axis of the gradient that has its d rows) that shards it by
      rows alone, see `memjax.sharding.Layout.along`; None leaves it to the compiler.

  Returns:
    `held`, refreshed.
  """
  plan = clock.plan
  batch = gradient.ndim - 2
  units = lambda x: x.reshape(plan.units, *x.shape[batch:])
  stacked, stack = units(gradient), jax.tree.map(units, held)
  low, high, order = ways.interval.due(clock, stack.interval)
  if when is not None:
    high = jnp.where(when, high, low)

  def body(step, carry):
    unit = step if order is None else order[step]
    mine = jax.tree.map(lambda x: x[unit], carry)
    matrix = stacked[unit].astype(at_least_float32(gradient))
    noise = jax.random.fold_in(fold_in_path(key, plan.path), clock.first + unit)
    renew = lambda parts, axis: _renew(ways, clock.count, matrix, parts, axis, noise, along)
    left, right, turns, pair = mine.left, mine.right, [None, None], None
    if plan.right:
      right, turns[1], pair = renew(mine.right, -1)
    if plan.left:
      left, turns[0], pair = renew(mine.left, -2)
    interval = ways.interval.after(clock, unit, mine.interval, *pair)
    moments = {k: moments_lib.rotate(x, kinds[k], *turns) for k, x in mine.moments.items()}
    fresh = Held(left, right, interval, moments)
    return jax.tree.map(lambda x, new: x.at[unit].set(new), carry, fresh)

  stack = lax.fori_loop(low, high, body, stack)
  return jax.tree.map(lambda new, old: new.reshape(old.shape), stack, held)


def _renew(ways, count, matrix, parts, axis, noise, along):
  """Returns one unit's new basis as stored, its turn `[r, r]`, and the pair of bases `[m, r]`."""
  tall = (lambda x: x) if axis == -2 else (lambda x: x.T)
  by_rows = (lambda x: x) if along is None else (lambda x: along(x, axis))
  old = by_rows(tall(unpack(parts, axis)))
  # Before and after: the iterations in between take their sharding from both ends.
  new = by_rows(_finite_or(ways.basis.refresh(tall(matrix), old, noise, count), old))
  return ways.storage.pack(tall(new), axis), _dot(new.T, old), (old, new)


def _finite_or(new, old):
  return jnp.where(jnp.all(jnp.isfinite(new)), new, old)


def _dot(x, y):
  return jnp.matmul(x, y, precision=PRECISION)
