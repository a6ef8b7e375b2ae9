"""Selection by facility location against brute force and hand-made cases."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.data import coreset

choose = jax.jit(coreset.choose, static_argnames=('keep', 'coordinates', 'budgets'))
locate = jax.jit(coreset.facility_location)


def distances(x):
  return np.abs(x[:, None] - x[None]).sum(-1, dtype=np.float64)


def value(similarity, chosen):
  return similarity[:, list(chosen)].max(axis=1).sum()


def greedy(similarity, count):
  """The definition: every candidate is tried in every turn."""
  chosen = []
  for _ in range(count):
    rest = [a for a in reversed(range(len(similarity))) if a not in chosen]
    chosen.append(max(rest, key=lambda a: value(similarity, [*chosen, a])))
  return chosen


def in_turn(turn):
  order = np.argsort(turn)
  return order[np.sort(turn) < len(turn)].tolist()


@pytest.mark.parametrize('seed', range(8))
def test_greedy_is_the_definition_and_reaches_what_is_guaranteed(seed):
  x = np.random.default_rng(seed).standard_normal((12, 3)).astype(np.float32)
  d = distances(x)
  similarity = d.max() - d
  group = np.zeros(12, np.int32)
  for count in (1, 2, 4):
    turn = np.asarray(locate(similarity.astype(np.float32), group, np.array([count])))
    assert in_turn(turn) == greedy(similarity, count)
    best = max(value(similarity, a) for a in itertools.combinations(range(12), count))
    assert value(similarity, in_turn(turn)) >= (1 - 1 / np.e) * best


# What submodlib 0.0.3 chooses, FacilityLocationFunction(mode='dense') with LazyGreedy: 6 of 24.
SUBMODLIB = {
  0: [14, 16, 22, 11, 15, 19],
  1: [22, 17, 4, 2, 7, 14],
  2: [12, 22, 18, 19, 20, 8],
  3: [18, 12, 17, 11, 20, 8],
  4: [8, 3, 4, 18, 6, 2],
  5: [18, 21, 15, 14, 8, 5],
}


@pytest.mark.parametrize('seed', SUBMODLIB)
def test_greedy_chooses_as_the_package_that_the_authors_used(seed):
  """In the same order, and the same of two that are each other's nearest."""
  x = np.random.default_rng(seed).integers(-30, 30, (24, 6)).astype(np.float32)  # Exact sums.
  d = np.abs(x[:, None] - x[None]).sum(-1)
  turn = np.asarray(locate(d.max() - d, np.zeros(24, np.int32), np.array([6])))
  assert in_turn(turn) == SUBMODLIB[seed]


def test_similarities_are_distances_within_a_source_and_nothing_between():
  x = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
  group = np.array([0, 0, 2, 2, 2, 0, 9])
  found = np.asarray(coreset.similarity(jnp.asarray(x), jnp.asarray(group)))
  d = distances(x)
  for s in (0, 2, 9):
    members = np.flatnonzero(group == s)
    mine = d[np.ix_(members, members)]
    np.testing.assert_allclose(found[np.ix_(members, members)], mine.max() - mine, atol=1e-5)
  assert not found[group[:, None] != group[None]].any()


def test_sources_are_chosen_from_apart_by_their_own_top_coordinates():
  """Each source varies along a coordinate of its own, and is dwarfed in all others."""
  rng = np.random.default_rng(1)
  source = np.array([0] * 6 + [1] * 9)
  x = 0.1 * rng.standard_normal((15, 40)).astype(np.float32)
  x[:6, 7] += 3 + np.arange(6)  # The largest mean of source 0; around it all else is noise.
  x[6:, 31] -= 3 + np.arange(9) ** 1.5
  chosen = choose(x, source, keep=5, small=np.zeros(2, bool), coordinates=1)
  expected = []
  for s, column, count in ((0, 7, 2), (1, 31, 3)):  # 5 places for 15: floors 2 and 3.
    members = np.flatnonzero(source == s)
    d = distances(x[members][:, [column]])
    expected += members[greedy(d.max() - d, count)].tolist()
  assert chosen.rows.tolist() == sorted(expected)
  assert np.flatnonzero(chosen.medoids).tolist() == sorted(expected)


# Sizes, places, and the budgets worked out by hand: floors, then one each from the least up.
PROPORTIONAL = [
  ([10, 3, 3], 7, [4, 2, 1]),
  ([5, 0, 7], 5, [3, 0, 2]),
  ([1, 1, 1, 1], 3, [1, 1, 1, 0]),
  ([97, 1, 1, 1], 32, [31, 1, 0, 0]),
  ([6, 6], 12, [6, 6]),
  ([6, 6], 0, [0, 0]),
]


@pytest.mark.parametrize(('sizes', 'total', 'expected'), PROPORTIONAL)
def test_budgets_by_hand(sizes, total, expected):
  assert coreset.share_out(jnp.array(sizes), total).tolist() == expected


@pytest.mark.parametrize('how', ['proportional', 'balanced'])
def test_budgets_add_up_and_fit(how):
  share = jax.jit(lambda sizes, total: coreset.share_out(sizes, total, how))
  rng = np.random.default_rng(0)
  for _ in range(200):
    sizes = rng.integers(0, 20, 6) * rng.integers(0, 2, 6)
    total = rng.integers(0, sizes.sum() + 1)
    budget = np.asarray(share(sizes, total))
    assert budget.sum() == total
    assert (budget >= 0).all()
    assert (budget <= sizes).all()
    if how == 'balanced':  # Who has less than another has all there is of it, or one less.
      assert (budget[budget < sizes] >= budget.max() - 1).all()


def test_small_sources_are_kept_whole_and_nobody_twice():
  for seed in range(20):
    rng = np.random.default_rng(seed)
    source = rng.choice(4, 24, p=[0.5, 0.3, 0.1, 0.1]).astype(np.int32)
    x = rng.standard_normal((24, 8)).astype(np.float32)
    x[rng.integers(24)] = x[rng.integers(24)]  # Two that are alike.
    small = np.array([False, False, True, True])
    chosen = choose(x, source, keep=12, small=small, coordinates=3)
    rows = chosen.rows.tolist()
    assert len(set(rows)) == 12
    assert rows == sorted(rows)
    assert set(np.flatnonzero(small[source])) <= set(rows)
    assert not (np.asarray(chosen.medoids) & small[source]).any()
    # Everybody is counted once, whoever stands for them.
    assert chosen.weights.sum() == 24


def test_more_of_small_sources_than_places_is_cut_to_the_places():
  chosen = choose(
    np.ones((6, 2), np.float32), np.array([1, 0, 1, 1, 1, 0]), keep=3, small=np.array([False, True])
  )
  assert chosen.rows.tolist() == [0, 2, 3]
  assert not chosen.medoids.any()


def test_an_example_that_is_not_finite_is_the_last_to_be_chosen():
  x = np.array([[np.nan], [1.0], [np.inf], [2.0], [7.0]], np.float32)
  source, small = np.zeros(5, np.int32), np.array([False])
  assert choose(x, source, keep=1, small=small).rows.tolist() == [3]
  assert choose(x, source, keep=3, small=small).rows.tolist() == [1, 3, 4]
  assert choose(x, source, keep=4, small=small).rows.tolist() == [0, 1, 3, 4]


def test_one_that_is_no_number_may_spoil_its_source_as_published():
  x = np.array([[np.nan], [1.0], [3.0], [2.0], [7.0], [9.0]], np.float32)
  source, small = np.array([0, 0, 0, 1, 1, 1]), np.zeros(2, bool)
  chosen = coreset.choose(x, source, 2, small, nan_similarity=-0.95)
  assert chosen.rows.tolist() == [2, 4]  # The last of all equals, and a medoid.


def test_sources_can_be_ignored():
  x = np.random.default_rng(3).standard_normal((10, 4)).astype(np.float32)
  source, small = np.arange(10) % 2, np.zeros(2, bool)
  x[source == 1] *= 9  # By themselves they cover far more than the others.
  d = distances(x)
  together = choose(x, source, keep=4, small=small, budgets='none').rows.tolist()
  assert together == sorted(greedy(d.max() - d, 4))
  assert together != choose(x, source, keep=4, small=small).rows.tolist()


def test_cluster_sizes_count_the_nearest():
  x = np.array([[0.0], [0.1], [0.3], [5.0], [5.1], [8.0]], np.float32)
  chosen = choose(x, np.zeros(6, np.int32), keep=2, small=np.array([False]))
  d = distances(x[:, :1])
  first, second = greedy(d.max() - d, 2)
  nearest = np.where(d[:, first] <= d[:, second], first, second)
  expected = [np.sum(nearest == row) for row in sorted((first, second))]
  assert chosen.weights.tolist() == expected
  assert sum(expected) == 6


def test_small_is_below_an_even_share_of_those_present():
  assert coreset.small_sources(jnp.array([5, 5, 5, 0])).tolist() == [False] * 4
  assert coreset.small_sources(jnp.array([8, 4, 3])).tolist() == [False, True, True]


def test_what_cannot_be_chosen_is_refused():
  x, source, small = jnp.ones((4, 2)), jnp.zeros(4, jnp.int32), jnp.array([False])
  with pytest.raises(ValueError, match='keep is 5; of a pool of 4'):
    coreset.choose(x, source, 5, small)
  with pytest.raises(ValueError, match="no budgets are called 'even'"):
    coreset.choose(x, source, 2, small, budgets='even')
