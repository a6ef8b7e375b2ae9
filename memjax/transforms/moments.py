"""Moments of a projected gradient, expressed in a new basis.

Shapes in this file: a moment is `[..., r, n]`, `[..., m, r]` or `[..., r, r]`, as the projected
gradient; `turn` is `[r, r]`, the new basis's coordinates of the old one.
"""

import jax
import jax.numpy as jnp

from memjax.transforms.bases import PRECISION
from memjax.transforms.units import at_least_float32

# Names under which optax's transforms keep their moments, and how those depend on the gradient.
KINDS = {
  'mu': 'linear',
  'trace': 'linear',
  'ema': 'linear',
  'nu': 'square',
  'sum_of_squares': 'square',
}


def rotate(moment, kind: str, turn_left, turn_right):
  """Rotates one unit's moment `[p, q]`; a turn that is None leaves its axis alone.

  The square of a rotated gradient is not a function of the squares. Its expectation under
  independent coordinates is: the squared entries of the turn, which keep it nonnegative.
  """
  rotated = moment.astype(at_least_float32(moment))
  for turn, axis in ((turn_left, 0), (turn_right, 1)):
    if turn is not None:
      turn = jnp.square(turn) if kind == 'square' else turn
      product = (turn, rotated) if axis == 0 else (rotated, turn.T)
      rotated = jnp.matmul(*product, precision=PRECISION)
  return rotated.astype(moment.dtype)


def of_leaves(inner_state, params, plans) -> list[dict[int, str]]:
  """Finds every projected leaf's moments in the state of the inner transform.

  State leaves end in their parameter's path, after the name of the field that holds them.

  Returns:
    For each leaf of `params`, index in `jax.tree.leaves(inner_state)` -> kind.
  """
  owners = {
    path: i
    for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params))
    if plans[i].projected
  }
  found = [{} for _ in plans]
  for index, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(inner_state)):
    for at, entry in enumerate(path):
      name = getattr(entry, 'name', None)
      if name in KINDS and path[at + 1 :] in owners:
        found[owners[path[at + 1 :]]][index] = KINDS[name]
  return found


def check(inner_state, projected, plans) -> None:
  """Refuses state of projected leaves that cannot be rotated: of unknown meaning, or not stored as
  numbers in the shape of the projected gradient.
  """
  leaves = jax.tree_util.tree_leaves_with_path(projected)
  shapes = {path: leaf.shape for (path, leaf), plan in zip(leaves, plans) if plan.projected}
  known = {index for found in of_leaves(inner_state, projected, plans) for index in found}
  for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(inner_state)):
    owners = [shape for owner, shape in shapes.items() if path[len(path) - len(owner) :] == owner]
    name = f'{jax.tree_util.keystr(path)} of the inner state, {leaf.dtype} {leaf.shape}'
    if index in known and (leaf.shape not in owners or not _holds_numbers(leaf)):
      raise ValueError(
        f"moments='rotate' cannot rotate {name}: quantised or factored, it does not hold the "
        f"moments of the projected gradient {owners[0]} one by one; use moments='keep'"
      )
    if index not in known and leaf.shape in owners:
      raise ValueError(
        f"moments='rotate' does not know how {name}, changes with the basis (it knows the fields "
        f"{', '.join(KINDS)}); use moments='keep'"
      )


def _holds_numbers(leaf) -> bool:
  """Whether a leaf is no array of codes; 8-bit floats are codes, they count in a block's scale."""
  return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 1
