"""Choosing the part of a batch that stands for all of it: from features of examples to rows.

Shapes in this file: a pool of `B` examples from `S` sources has features `f32[B, d]`, of which `h`
coordinates count; `K` examples are chosen. Sources are numbered from 0.

Everything here is static in shape, whatever the pool is made of, and runs inside a jitted step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.naming import nearest

BUDGETS = ('proportional', 'balanced', 'none')


class Choice(NamedTuple):
  """The rows of a pool to train on."""

  rows: jax.Array  # i32[K], ascending and distinct.
  weights: jax.Array  # f32[K], how many examples each stands for; 1 for those of small sources.
  medoids: jax.Array  # bool[B], which were chosen by their features.


def choose(
  features: jax.Array,
  source: jax.Array,
  keep: int,
  small: jax.Array,
  *,
  coordinates: int = 0,
  budgets: str = 'proportional',
  nan_similarity: float | None = None,
  everywhere: Callable[[Any], Any] = lambda x: x,
) -> Choice:
  """Keeps all examples of small sources, and of the others those that lie in the middle of most.

  The others are chosen source by source: of a source's features the `h` coordinates with the
  largest mean, the L1 distance between them, and greedily the medoids of a facility location. An
  example with a feature that is not finite is chosen only when there are not enough others, which
  `keep` fixes; where small sources alone have more than `keep`, the first of them.

  Memory: `B h + B^2 + S d` numbers beside the features. Time: `B^2 (h + K)` operations.

  Args:
    features: f32[B, d].
    source: i32[B], below S.
    keep: K, at most B.
    small: bool[S], sources of which everything is kept.
    coordinates: h; 0 takes all.
    budgets: How many of each source, see `share_out`; 'none' chooses from all sources as from one.
    nan_similarity: Takes part in the choice in place of similarities that are not numbers, which
      those of a whole source are when one feature is not; None leaves such an example out.
    everywhere: Puts arrays on all devices, where the pool is spread over them: what is compared
      is brought together, `B h` numbers, and not the features.

  Raises:
    ValueError: for a `keep` that is not between 1 and B, or an unknown kind of budgets.

  >>> features = jnp.array([[0.0], [1.0], [2.0], [9.0]])
  >>> source = jnp.array([0, 0, 0, 1])
  >>> chosen = choose(features, source, keep=2, small=jnp.array([False, True]))
  >>> chosen.rows.tolist(), chosen.weights.tolist()
  ([1, 3], [3.0, 1.0])

  References:
    Nguyen et al., `Mini-batch Coresets for Memory-efficient Language Model Training on Data
    Mixtures <https://arxiv.org/abs/2407.19580>`_, 2025
  """
  pool, sources = features.shape[0], small.shape[0]
  check_keep(keep, pool)
  kept = small[source]
  sound = jnp.all(jnp.isfinite(features), axis=1) | (nan_similarity is not None)
  # Whoever is kept anyway, or cannot be compared, belongs to a group of its own without a budget.
  group = jnp.where(kept | ~sound, sources, 0 if budgets == 'none' else source)
  features = jnp.where((group < sources)[:, None], features, 0)
  group, kept = everywhere((group, kept))
  compared = everywhere(top_coordinates(features, group, sources, coordinates))
  near = similarity(compared, group)
  if nan_similarity is not None:
    near = jnp.where(jnp.isnan(near), nan_similarity, near)
  sizes = jnp.bincount(group, length=sources + 1).at[sources].set(0).astype(jnp.int32)
  places = jnp.clip(keep - jnp.sum(kept, dtype=jnp.int32), 0, jnp.sum(sizes))
  turn = facility_location(near, group, share_out(sizes, places, budgets))
  medoids = turn < pool
  priority = jnp.where(kept, 0, jnp.where(medoids, 1, 2))
  rows = jnp.sort(jnp.argsort(priority)[:keep]).astype(jnp.int32)
  return Choice(rows, cluster_sizes(near, group, turn)[rows], medoids)


def check_keep(keep: int, pool: int) -> None:
  """Raises a `ValueError` unless `keep` of `pool` examples can be chosen."""
  if not 1 <= keep <= pool:
    raise ValueError(f'keep is {keep}; of a pool of {pool} between 1 and {pool} can be chosen')


def small_sources(counts: jax.Array) -> jax.Array:
  """Returns which sources have less than an even share: `bool[S]`.

  Args:
    counts: i32[S], examples of each source; sources without any are not counted.

  >>> small_sources(jnp.array([90, 6, 0, 4])).tolist()
  [False, True, False, True]
  """
  present = counts > 0
  return present & (counts * jnp.sum(present) < jnp.sum(counts))


def share_out(sizes: jax.Array, total: jax.Array | int, how: str = 'proportional') -> jax.Array:
  """Returns how many of each source are chosen: `i32[S]`, no more than there are, `total` in all.

  Args:
    sizes: i32[S], examples to choose from.
    total: At most the sum of the sizes.
    how: 'proportional' gives a source its share rounded down, and one of what is left to those with
      least; 'balanced' gives all sources the same, as far as they have it; 'none' is for a single
      source.

  Raises:
    ValueError: for another `how`.

  >>> share_out(jnp.array([10, 3, 3]), 7).tolist()
  [4, 2, 1]
  >>> share_out(jnp.array([10, 3, 1]), 7, 'balanced').tolist()
  [3, 3, 1]
  """
  if how not in BUDGETS:
    raise ValueError(f'no budgets are called {how!r}; {nearest(how, BUDGETS)}')
  if how == 'balanced':
    return _balanced(sizes, total)
  budget = sizes * total // jnp.maximum(jnp.sum(sizes), 1)
  least_first = jnp.argsort(jnp.where(sizes > 0, budget, jnp.iinfo(jnp.int32).max))
  rank = jnp.zeros_like(sizes).at[least_first].set(jnp.arange(sizes.size, dtype=sizes.dtype))
  return budget + (rank < total - jnp.sum(budget))


def _balanced(sizes, total):
  """One at a time to whoever has least and has more."""

  def give(_, budget):
    has_more = jnp.where(budget < sizes, budget, jnp.iinfo(jnp.int32).max)
    return budget.at[jnp.argmin(has_more)].add(1)

  return lax.fori_loop(0, total, give, jnp.zeros_like(sizes))


def top_coordinates(
  features: jax.Array, group: jax.Array, groups: int, coordinates: int
) -> jax.Array:
  """Returns of every example the `h` coordinates that are largest in its group's mean: `f32[B, h]`.

  Args:
    features: f32[B, d].
    group: i32[B]; an example of group `groups` or above gets anything.
    groups: Number of groups.
    coordinates: h; 0, or d and above, takes all as they are.
  """
  if not 0 < coordinates < features.shape[1]:
    return features
  sums = jax.ops.segment_sum(features, group, num_segments=groups)
  _, largest = lax.top_k(jnp.abs(sums), coordinates)  # The sum's are the mean's.
  return jnp.take_along_axis(features, largest[jnp.minimum(group, groups - 1)], axis=1)


def similarity(features: jax.Array, group: jax.Array) -> jax.Array:
  """Returns the largest L1 distance in a group minus that of a pair: `f32[B, B]`, 0 between groups.

  Holds `B h` numbers beside the result: a row of distances is formed at a time.
  """
  row = lambda one: jnp.sum(jnp.abs(features - one[None]), axis=1)
  distances = lax.map(row, features)
  together = group[:, None] == group[None]
  widest = jnp.max(jnp.where(together, distances, 0), axis=1)
  widest = jnp.max(jnp.where(together, widest[None], 0), axis=1)
  return jnp.where(together, widest[:, None] - distances, 0)


def facility_location(similarity: jax.Array, group: jax.Array, budget: jax.Array) -> jax.Array:
  """Chooses examples so that everyone has a similar one: greedily maximises `sum_i max_a S(i, a)`.

  The sum reaches at least `1 - 1/e` of the best possible. Among equals the last of the pool is
  chosen, as `submodlib` does. Groups do not see each other, so that one loop over all choices
  serves them all.

  Args:
    similarity: f32[B, B], 0 between groups and at least 0 within one.
    group: i32[B], below the length of `budget`.
    budget: i32[S], choices from each group, no more than it has members.

  Returns:
    i32[B], the turn in which an example was chosen; B for those who were not.

  References:
    Nemhauser et al., `An analysis of approximations for maximizing submodular set functions
    <https://doi.org/10.1007/BF01588971>`_, 1978
  """
  never = group.size

  def pick(index, carry):
    turn, best, left = carry
    gain = jnp.sum(jnp.maximum(similarity - best[:, None], 0), axis=0)
    available = (turn == never) & (left[group] > 0)
    chosen = never - 1 - jnp.argmax(jnp.where(available, gain, -1)[::-1])
    best = jnp.maximum(best, similarity[:, chosen])
    return turn.at[chosen].set(index), best, left.at[group[chosen]].add(-1)

  start = jnp.full(never, never, jnp.int32), jnp.zeros(never, similarity.dtype), budget
  return lax.fori_loop(0, jnp.sum(budget), pick, start)[0]


def cluster_sizes(similarity: jax.Array, group: jax.Array, turn: jax.Array) -> jax.Array:
  """Returns how many examples each chosen one stands for: `f32[B]`; 1 for the others.

  An example belongs to the most similar chosen one of its group, a chosen one to itself.

  Args:
    similarity: As `facility_location` takes it.
    group: i32[B].
    turn: As `facility_location` returns it.
  """
  never = group.size
  chosen = turn < never
  candidate = chosen[None] & (group[:, None] == group[None])
  # Among equals, whoever was chosen first; so the columns are compared in that order.
  order = jnp.argsort(turn)
  best = order[jnp.argmax(jnp.where(candidate, similarity, -1)[:, order], axis=1)]
  best = jnp.where(chosen, jnp.arange(never), best)
  stands = jax.ops.segment_sum(jnp.any(candidate, axis=1).astype(jnp.float32), best, never)
  return jnp.where(chosen, stands, 1)
