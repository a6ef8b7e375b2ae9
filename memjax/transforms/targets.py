"""Which leaves are projected, on which side, to which rank.

Shapes in this file: a matrix leaf is `[..., m, n]`; leading axes are batch (scan-stacked layers,
experts), and each of their matrices is a unit with a basis of its own.
"""

import difflib
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from memjax.naming import path_string
from memjax.transforms.layers import Layer
from memjax.transforms.units import adapted_path, is_matrix

SIDES = ('short', 'long', 'left', 'right', 'both')

# (slash path, leaf) -> whether to project it; or a regular expression that is searched in the path.
Targets = str | Callable[[str, Any], bool] | None
Rank = int | Callable[[str, Any], int]


class Plan(NamedTuple):
  """What happens to one leaf; static, derived from shapes and paths only."""

  path: str
  left: bool  # Whether axis m is projected.
  right: bool  # Whether axis n is.
  rank: int
  units: int  # Matrices in the leaf, 0 when it is not projected.
  first: int  # This leaf's first unit, in the numbering over all leaves.
  total: int  # Units of all leaves.
  sliced: bool = False  # Whether the leaf is one layer of those that `first` and `total` count.

  @property
  def projected(self) -> bool:
    return self.units > 0


def default_targets(path: str, leaf: Any) -> bool:
  """Takes the matrices between the embeddings and the head, as GaLore's authors do.

  They project every linear layer whose path contains `attn` or `mlp`. This rule gives the same
  choice on memjax's models and needs no such names: a leaf with two axes or more, unless a part of
  its path speaks of an embedding, a norm, a scale, a bias or the output head. Scan-stacked norms
  and biases `[L, D]` have two axes and are vectors all the same, hence the words. The factors of an
  adapted matrix (`kernel/a`, `kernel/b`) are the layer's, as it is.
  """
  parts = adapted_path(path).split('/')
  return is_matrix(path, leaf) and not any(map(_NOT_A_LAYER.search, parts))


_NOT_A_LAYER = re.compile(r'embed|^(wte|wpe|decoder_logits)$|(^|_)head$', re.IGNORECASE)


def check_rank(rank: Rank) -> None:
  """Refuses a rank that cannot be the size of an axis."""
  if callable(rank):
    return
  if isinstance(rank, jax.Array):
    raise ValueError(
      'rank is the size of an axis and cannot be an array; with optax.inject_hyperparams pass '
      "static_args=('rank', ...) so that it stays a Python int"
    )
  if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank <= 0:
    raise ValueError(f'rank must be a positive int, got {rank!r}')


def plan_leaves(
  tree: Any, rank: Rank, side: str, targets: Targets, layer: Layer | None = None
) -> list[Plan]:
  """Decides for every leaf of `tree`, in the order of `jax.tree.leaves`.

  Args:
    tree: Arrays or shapes.
    rank: As `project`.
    side: As `project`.
    targets: As `project`.
    layer: The layer that `tree` holds of its stacked leaves; they are decided on as whole stacks.

  Raises:
    ValueError: if a regular expression matches no path, or no targeted leaf has a subspace of its
      rank.
  """
  if layer is not None:
    return [_slice(plan, layer) for plan in plan_leaves(layer.whole(tree), rank, side, targets)]
  named = [(path_string(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  targeted = _match(named, targets)
  plans, first = [], 0
  for path, leaf in named:
    units, left, right, leaf_rank = 0, False, False, 0
    if path in targeted and leaf.ndim >= 2:
      m, n = leaf.shape[-2:]
      leaf_rank = rank(path, leaf) if callable(rank) else int(rank)
      check_rank(leaf_rank)
      if leaf_rank <= min(m, n):
        left, right = _sides(side, m, n)
        units = math.prod(leaf.shape[:-2])
    plans.append(Plan(path, left, right, leaf_rank, units, first, total=0))
    first += units
  if named and first == 0:
    _refuse(named, targeted, rank)
  return [plan._replace(total=first) for plan in plans]


def first_in_leaf(plan: Plan, layer: Layer | None):
  """Number, within its leaf, of the first unit that a transform sees: of a layer, or 0."""
  return layer.index * plan.units if plan.sliced else 0


def _slice(plan: Plan, layer: Layer) -> Plan:
  if not layer.holds(plan.path):
    return plan
  return plan._replace(units=plan.units // layer.count, sliced=True)


def _sides(side: str, m: int, n: int) -> tuple[bool, bool]:
  """Whether m and whether n is projected; ties go where the published code sends them."""
  if side == 'both':
    return True, True
  left = {'short': m <= n, 'long': m > n, 'left': True, 'right': False}[side]
  return left, not left


def _match(named, targets: Targets) -> set[str]:
  if targets is None:
    return {path for path, leaf in named if leaf.ndim >= 2}
  if callable(targets):
    return {path for path, leaf in named if targets(path, leaf)}
  matched = {path for path, _ in named if re.search(targets, path)}
  if named and not matched:
    paths = [path for path, _ in named]
    nearest = difflib.get_close_matches(targets, paths, n=3, cutoff=0.0)
    raise ValueError(
      f'targets={targets!r} matches no leaf; the nearest paths are {", ".join(nearest)}'
    )
  return matched


def _refuse(named, targeted, rank):
  candidates = [(path, leaf) for path, leaf in named if path in targeted] or named
  path, leaf = max(candidates, key=lambda item: min(item[1].shape[-2:], default=0))
  leaf_rank = rank(path, leaf) if callable(rank) else rank
  raise ValueError(
    f'{path}: shape {tuple(leaf.shape)} has no subspace of rank {leaf_rank}, nor has any other '
    'targeted leaf; lower `rank`, choose matrices with `targets`, or use the inner transform alone'
  )
