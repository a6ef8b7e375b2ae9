"""Whose turn it is, in steps that train a part of the parameters at a time.

Shapes in this file: `L` layers. A unit is the embedding, one layer, or the head with the last norm;
they are numbered from the bottom, 0 to `L + 1`.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

ORDERS = ('bottom2up', 'top2down', 'random')


class Rotation(NamedTuple):
  """Which units train in which step, and what becomes of the others' optimizer state."""

  active: Callable  # Step i32[] -> bool[L + 2], the units that it trains.
  every: int  # Updates from one switch to the next.
  size: int  # Most layers that train at once.
  ends: bool  # Whether the embedding and the head ever train.
  keep: bool  # Whether a unit finds its state again at its next turn; else it starts anew.
  cycle: int  # Updates between two values of the learning rate.
  master: bool = False  # Whether f32 copies of 16-bit parameters train while it is their turn.

  def learning_rate(self, schedule: optax.Schedule) -> optax.Schedule:
    """Returns `schedule`, advanced once a cycle.

    >>> hift(layers=2).learning_rate(lambda count: 10 * count)(7)
    40
    """
    return lambda count: schedule(count // self.cycle * self.cycle)


def hift(layers: int, *, size: int = 1, order: str = 'bottom2up', key=None) -> Rotation:
  """HiFT: all units in groups of `size`, one group a step; a cycle is once through all of them.

  A group's state is kept while others train, and the learning rate is that of the cycle's first
  step: from a warm-up that begins at zero, the first cycle fills the moments and moves nothing.
  Trains everything, embedding and head included: `k = ceil((L + 2) / size)` groups, of which the
  last may be smaller.

  Args:
    layers: Layers `L`.
    size: Units in a group.
    order: `'bottom2up'`, `'top2down'`, or `'random'`: shuffled once.
    key: Key of the shuffle; default 0.

  Raises:
    ValueError: for a size or order that does not exist.

  References:
    Liu et al., `HiFT: A Hierarchical Full Parameter Fine-Tuning Strategy
    <https://arxiv.org/abs/2401.15207>`_, 2024 (its code also rotates between micro-batches)

  >>> jnp.flatnonzero(hift(layers=3, size=2, order='top2down').active(1)).tolist()
  [1, 2]
  """
  _check(size, layers + 2, 'units', order)
  units = np.arange(layers + 2)
  if order == 'random':
    units = np.asarray(jax.random.permutation(_root(key), units))
  rows = _chunks(units[::-1] if order == 'top2down' else units, size, layers)
  active = lambda step: jnp.asarray(rows)[step % len(rows)]
  return Rotation(active, 1, min(size, layers), ends=True, keep=True, cycle=len(rows))


def badam(
  layers: int,
  *,
  size: int = 1,
  every: int = 50,
  order: str = 'top2down',
  ends: bool = False,
  key=None,
) -> Rotation:
  """BAdam: block coordinate descent, `every` updates of one block of `size` layers, then the next.

  Each turn starts from fresh state, and from an f32 copy of the block's 16-bit parameters, which
  trains in their place: 4 bytes a parameter of one block. The embedding and the head stay as they
  are, or, with `ends`, are blocks of their own.

  Args:
    layers: Layers `L`.
    size: Layers in a block; the last may be smaller.
    every: Updates a turn.
    order: `'top2down'`, `'bottom2up'`, or `'random'`: each round in a new order.
    ends: Whether embedding and head have turns too.
    key: Root key of the orders; default 0.

  Raises:
    ValueError: for a size, interval or order that does not exist.

  References:
    Luo et al., `BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language
    Models <https://arxiv.org/abs/2404.02827>`_, 2024 (its code makes the first turn one update
    short)

  >>> badam = badam(layers=3, every=10)
  >>> [jnp.flatnonzero(badam.active(step)).tolist() for step in (0, 9, 10, 29, 30)]
  [[3], [3], [2], [1], [3]]
  """
  _check(size, layers, 'layers', order)
  _check(every, math.inf, 'updates')
  rows = _chunks(np.arange(1, layers + 1), size, layers)
  if ends:
    rows = np.concatenate([_chunks([0], 1, layers), rows, _chunks([layers + 1], 1, layers)])
  rows = rows[::-1] if order == 'top2down' else rows

  def active(step):
    round_, turn = step // every // len(rows), step // every % len(rows)
    if order == 'random':
      turn = jax.random.permutation(jax.random.fold_in(_root(key), round_), len(rows))[turn]
    return jnp.asarray(rows)[turn]

  return Rotation(active, every, size, ends=ends, keep=False, cycle=1, master=True)


def lisa(layers: int, *, size: int = 2, every: int = 20, keep: bool = False, key=None) -> Rotation:
  """LISA: embedding and head always, and `size` layers drawn uniformly every `every` updates.

  Args:
    layers: Layers `L`.
    size: Layers drawn at once, without replacement.
    every: Updates between draws.
    keep: False starts everything from fresh state at every draw, as the paper does; True keeps the
      state of all layers for their next turn, as the authors' code does.
    key: Root key of the draws; default 0.

  Raises:
    ValueError: for a size or interval that does not exist.

  References:
    Pan et al., `LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
    Fine-Tuning <https://arxiv.org/abs/2403.17919>`_, 2024

  >>> [int(lisa(layers=8).active(step).sum()) for step in (0, 1, 20)]
  [4, 4, 4]
  """
  _check(size, layers, 'layers')
  _check(every, math.inf, 'updates')

  def active(step):
    drawn = jax.random.permutation(jax.random.fold_in(_root(key), step // every), layers)[:size]
    return jnp.ones(layers + 2, bool).at[1:-1].set(False).at[drawn + 1].set(True)

  return Rotation(active, every, size, ends=True, keep=keep, cycle=1)


ROTATIONS = {'hift': hift, 'badam': badam, 'lisa': lisa}


def arguments(name: str) -> tuple[str, ...]:
  """Returns the arguments that a user chooses of `ROTATIONS[name]`; none for another name."""
  taken = inspect.signature(ROTATIONS[name]).parameters if name in ROTATIONS else ()
  return tuple(argument for argument in taken if argument not in ('layers', 'key'))


def _chunks(units, size: int, layers: int) -> np.ndarray:
  """Cuts numbers of units into groups of `size`: `bool[k, L + 2]`."""
  groups = [units[i : i + size] for i in range(0, len(units), size)]
  rows = np.zeros((len(groups), layers + 2), bool)
  for row, group in zip(rows, groups):
    row[group] = True
  return rows


def _root(key):
  return jax.random.key(0) if key is None else key


def _check(number: int, most, what: str, order: str = ORDERS[0]) -> None:
  if order not in ORDERS:
    raise ValueError(f'order {order!r} does not exist; there are {", ".join(ORDERS)}')
  if not 1 <= number <= most:
    limit = f' and at most {most}' if most < math.inf else ''
    raise ValueError(f'a turn of {number} {what} does not exist; take at least 1{limit}')
