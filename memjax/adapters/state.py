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
    chosen = jnp.asarray(where[owner])
    if chosen.ndim and _broadcast(chosen.shape, old.shape) != old.shape:
      raise ValueError(
        f'optimizer state {path} of shape {old.shape} cannot restart a vector of {owner} alone '
        f"(mask {chosen.shape}); choose an optimizer that keeps it in the leaf's shape, such as "
        'vector_adam'
      )
    return jnp.where(chosen, new, old)

  return _of_leaves(choose, where, state, new)


def pruned(state: Any, prune: Callable, shapes: Mapping[str, tuple[int, ...]], due: Any) -> Any:
  """Returns optimizer state with moments of chosen leaves thinned out, when that is due.

  Args:
    state: Of `transform.init` or a later update.
    prune: `prune(path of a leaf, {path of the state: moment}) -> the same dict`, of all moments of
      one leaf, in the order in which the optimizer holds them.
    shapes: Path of a trained leaf -> its shape, which is that of its moments; other state of the
      leaf, such as counts of its vectors, stays.
    due: bool[]; nothing is computed when it is not.

  Raises:
    ValueError: naming a leaf of which there is state, but no array of its shape.
  """
  moments = {owner: {} for owner in shapes}
  stateful = set()

  def gather(path, owner, leaf):
    stateful.add(owner)
    if leaf.shape == shapes[owner] and jnp.issubdtype(leaf.dtype, jnp.floating):
      moments[owner][path] = leaf
    return leaf

  _of_leaves(gather, shapes, state)
  if bare := sorted(owner for owner in stateful if not moments[owner]):
    raise ValueError(
      f'the optimizer keeps no moments of {bare[0]} in its shape {shapes[bare[0]]}, to be pruned '
      "number by number; set prune='zero', or choose an optimizer whose moments are arrays"
    )
  thin_all = lambda all_of: {owner: prune(owner, one) for owner, one in all_of.items()}
  moments = when(due, thin_all, moments)
  put = lambda path, owner, leaf: moments[owner].get(path, leaf)
  return _of_leaves(put, shapes, state)


def when(due: Any, function: Callable, x: Any) -> Any:
  """Returns `function(x)` when it is due, else `x`: a loop that runs once or not at all, which
  computes nothing then and changes donated arrays in place.

  A GPU waits for its host to learn whether it runs: take one for all that is due together.
  """
  return jax.lax.fori_loop(0, jnp.where(due, 1, 0), lambda _, x: function(x), x)


def _of_leaves(function, owners, state, *others):
  """`function(path, owner, leaf, ...)` of the state that belongs to one of `owners`."""

  def apply(path, leaf, *rest):
    owner = _owner(path, owners)
    return leaf if owner is None else function(path_string(path), owner, leaf, *rest)

  return jax.tree.map_with_path(apply, state, *others)


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
