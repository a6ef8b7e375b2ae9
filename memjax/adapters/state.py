"""Optimizer state of factors that begin anew: all of it, some vectors' of it, or a part at random.

What belongs to a trained leaf is found by its path, which ends the path of its state
(`0/mu/blocks/attn/q/kernel/b`), as `memjax.sharding.state_shardings` does. So any optimizer will
do whose state follows its parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.naming import path_string


def fresh(init: Callable, params: Any) -> Any:
  """Returns the state of an optimizer before its first update of these parameters.

  Under `jit`, what is not used of it is not made.

  Args:
    init: Of the optimizer.
    params: Parameters, adapted or not.
  """
  return init(weights.dense(weights.trained(params)))


def restarted(state: Any, new: Any, where: Mapping[str, jax.Array]) -> Any:
  """Returns optimizer state in which chosen leaves, or vectors of them, are as in new state.

  State that all leaves share, such as one count of updates, stays; `memjax.transforms.vector_adam`
  has a count for each vector.

  Args:
    state: Of `transform.init` or a later update.
    new: What `init` gives now.
    where: Path of a trained leaf -> whether to restart: bool[], or bool[..., 1, r] or the like,
      which broadcasts to the leaf.

  Raises:
    ValueError: naming the state that is not divided into the leaf's vectors.
  """

  def choose(path, owner, old, new):
    chosen = where[owner]
    if chosen.ndim and _broadcast(chosen.shape, old.shape) != old.shape:
      raise ValueError(
        f'optimizer state {path} of shape {old.shape} cannot restart a vector of {owner} alone '
        f"(mask {chosen.shape}); choose an optimizer that keeps it in the leaf's shape, such as "
        'vector_adam'
      )
    return jnp.where(chosen, new, old)

  return _of_leaves(choose, where, state, new)


def pruned(state: Any, change: Callable, shapes: Mapping[str, tuple[int, ...]]) -> Any:
  """Returns optimizer state with moments of chosen leaves replaced.

  Args:
    state: Of `transform.init` or a later update.
    change: `change(path of the state, path of the leaf, moment) -> moment`.
    shapes: Path of a trained leaf -> its shape, which is that of its moments; other state of the
      leaf, such as counts of its vectors, stays.

  Raises:
    ValueError: naming a leaf of which no state has that shape, where something is kept in codes.
  """
  found = set()

  def change_moment(path, owner, leaf):
    if leaf.shape != shapes[owner] or not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    found.add(owner)
    return change(path, owner, leaf)

  after = _of_leaves(change_moment, shapes, state)
  kept_otherwise = {owner for owner, _ in _owned(state, shapes)} - found
  if kept_otherwise:
    raise ValueError(
      f'the optimizer keeps no moments of {min(kept_otherwise)} in its shape '
      f"{shapes[min(kept_otherwise)]}, to be pruned number by number; set prune='zero', or choose "
      'an optimizer whose moments are arrays of that shape'
    )
  return after


def _of_leaves(function, owners, state, *others):
  """`function(path, owner, leaf, ...)` of the state that belongs to one of `owners`."""

  def apply(path, leaf, *rest):
    owner = _owner(path, owners)
    return leaf if owner is None else function(path_string(path), owner, leaf, *rest)

  return jax.tree.map_with_path(apply, state, *others)


def _owned(state, owners):
  found = ((_owner(path, owners), leaf) for path, leaf in jax.tree.leaves_with_path(state))
  return [(owner, leaf) for owner, leaf in found if owner is not None]


def _owner(path, owners) -> str | None:
  """The longest of the paths that end this one."""
  keys = [path_string((key,)) for key in path]
  ends = ('/'.join(keys[start:]) for start in range(len(keys)))
  return next((end for end in ends if end in owners), None)


def _broadcast(*shapes):
  try:
    return jnp.broadcast_shapes(*shapes)
  except ValueError:
    return None
