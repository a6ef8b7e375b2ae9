"""APOLLO, Fira, GoLore and Q-GaLore against what defines each of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import optimizers, transforms
from memjax.transforms import intervals, lifts, storage
from memjax.transforms.targets import Plan

RANK = 4


def _normal(shape, seed):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _run(transform, gradients, params=None):
  """Yields update and state of one leaf 'w', jitted once."""
  update = jax.jit(transform.update)
  state = None
  for gradient in gradients:
    state = transform.init({'w': gradient}) if state is None else state
    updates, state = update({'w': gradient}, state, params)
    yield np.asarray(updates['w']), state


class TestLimitNormGrowth:
  def test_every_matrix_of_a_stack_grows_by_one_percent_at_most(self):
    transform = transforms.limit_norm_growth()
    first, second = _normal((2, 3, 4), 0), _normal((2, 3, 4), 1)
    second = second * jnp.array([10.0, 0.1])[:, None, None]
    (one, _), (two, state) = _run(transform, [first, second])
    np.testing.assert_array_equal(one, first)
    norms = np.linalg.norm(np.asarray(first), axis=(1, 2))
    np.testing.assert_allclose(np.linalg.norm(two[0]), 1.01 * norms[0], rtol=1e-6)
    np.testing.assert_allclose(two[0] / two[0][0, 0], second[0] / second[0, 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(two[1], second[1])
    np.testing.assert_allclose(state.norm['w'], np.linalg.norm(two, axis=(1, 2)), rtol=1e-6)

  def test_zeros_and_nans_leave_the_limit_where_it_was(self):
    ones = jnp.ones((2, 2))
    sizes = [0.0, 1.0, 0.0, np.nan, 100.0]
    norms = [
      np.linalg.norm(u) for u, _ in _run(transforms.limit_norm_growth(), [s * ones for s in sizes])
    ]
    np.testing.assert_allclose(norms, [0, 2, 0, np.nan, 2.02], rtol=1e-6)

  def test_vectors_of_a_stack_are_limited_apart(self):
    transform = transforms.limit_norm_growth()
    state = transform.init({'norm': {'scale': jnp.ones((3, 5))}})
    assert state.norm['norm']['scale'].shape == (3,)

  def test_a_growth_below_one_is_refused(self):
    with pytest.raises(ValueError, match='at least 1'):
      transforms.limit_norm_growth(0.9)


class TestApollo:
  @pytest.mark.parametrize('shape', [(2, 6, 9), (9, 6)], ids=['stacked', 'tall'])
  def test_first_update_scales_channels_by_their_projection(self, shape):
    # With b1 = 0 the first moment is the projection, and Adam's first answer is its sign.
    transform = transforms.scale_by_apollo(3, b1=0.0, scale=2.0, eps=0.0)
    gradient = _normal(shape, 0)
    ((update, state),) = _run(transform, [gradient])
    axis = -2 if shape[-2] <= shape[-1] else -1
    projected = np.asarray(state.inner.mu['w'])
    assert projected.shape[axis] == 3
    factor = np.sqrt(3) / np.linalg.norm(projected, axis=axis, keepdims=True)
    np.testing.assert_allclose(update, 2 * factor * gradient, rtol=1e-5)

  def test_mini_has_one_factor_a_matrix(self):
    transform = transforms.scale_by_apollo_mini(b1=0.0, eps=0.0)
    gradient = _normal((2, 6, 9), 0)
    ((update, state),) = _run(transform, [gradient])
    projected = np.asarray(state.inner.mu['w'])
    factor = np.sqrt(9) / np.linalg.norm(projected, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(update, 128**0.5 * factor * gradient, rtol=1e-5)

  def test_updates_grow_by_one_percent_at_most(self):
    gradients = [_normal((6, 9), step) * (1.0, 0.01)[step % 2] for step in range(6)]
    updates = [u for u, _ in _run(transforms.scale_by_apollo(3), gradients)]
    norms = np.linalg.norm(updates, axis=(1, 2))
    growth = norms[1:] / norms[:-1]
    # At least once the limit was met.
    np.testing.assert_allclose(growth.max(), 1.01, rtol=1e-5)

  def test_projections_are_drawn_again_from_their_address_when_they_are_due(self):
    layers, m, every = 3, 64, 6
    eye = jnp.broadcast_to(jnp.eye(m, m + 1), (layers, m, m + 1))
    transform = transforms.scale_by_apollo(RANK, b1=0.0, refresh_every=every, stagger=True)
    # Where the gradient is the identity, its projection is P^T.
    runs = list(_run(transform, [eye] * (2 * every + 1)))
    bases = np.stack([np.asarray(state.inner.mu['w'])[..., :m] for _, state in runs])
    changed = np.any(bases[1:] != bases[:-1], axis=(2, 3))
    # Unit u is due in updates 2 u, 2 u + 6, ...; the first update has drawn for all of them.
    due = [[(step - 2 * unit) % every == 0 for unit in range(layers)] for step in range(1, 13)]
    np.testing.assert_array_equal(changed, due)
    distinct = {basis.tobytes() for basis in bases.reshape(-1, RANK, m)}
    assert len(distinct) == layers + changed.sum()
    # 4 * 64 draws of variance 1 / 4: their mean square is within 4 standard deviations.
    squares = np.mean(np.square(bases), axis=(2, 3)) * RANK
    assert np.all(np.abs(squares - 1) < 4 * np.sqrt(2 / (RANK * m)))
    # What it keeps is moments, norms and counts.
    state = runs[0][1]
    assert jax.tree.leaves((state.left, state.right, state.interval)) == []

  def test_bases_that_follow_the_gradient_are_kept(self):
    gradient = _normal((6, 9), 0)
    transform = transforms.scale_by_apollo(3, basis=transforms.svd())
    ((update, state),) = _run(transform, [gradient])
    vectors = np.linalg.svd(np.asarray(gradient))[0][:, :3]
    np.testing.assert_allclose(np.abs(vectors.T @ state.left['w']), np.eye(3), atol=1e-5)
    assert np.linalg.matrix_rank(update) == 6


class TestFira:
  def test_update_is_adam_inside_the_subspace_and_the_scaled_rest_outside(self):
    first, second = _normal((2, 6, 9), 0), 100 * _normal((2, 6, 9), 1)
    transform = transforms.scale_by_fira(3, basis=transforms.svd(), scale=0.5)
    adam = optax.scale_by_adam()
    (one, state), (two, _) = _run(transform, [first, second])
    basis = np.asarray(state.left['w'])
    project = lambda x: np.swapaxes(basis, 1, 2) @ np.asarray(x)
    inner = adam.init(project(first))
    limits = None
    for gradient, update in ((first, one), (second, two)):
      answer, inner = adam.update(project(gradient), inner)
      np.testing.assert_allclose(project(update), 0.5 * answer, atol=1e-5)
      ratio = np.linalg.norm(answer, axis=1) / np.linalg.norm(project(gradient), axis=1)
      rest = ratio[:, None] * (gradient - basis @ project(gradient))
      norms = np.linalg.norm(rest, axis=(1, 2))
      if limits is not None:
        assert np.any(norms > limits)
        rest *= np.minimum(limits / norms, 1)[:, None, None]
      np.testing.assert_allclose(update - basis @ project(update), rest, atol=1e-5)
      limits = 1.01 * np.linalg.norm(rest, axis=(1, 2))

  def test_a_subspace_without_complement_is_refused(self):
    with pytest.raises(ValueError, match='svd'):
      transforms.scale_by_fira(3, basis=transforms.random_projection())


class TestGoLore:
  def test_bases_come_from_the_gradient_then_from_chance(self):
    # One direction holds all of the gradient.
    gradient = jnp.zeros((2, 32, 40)).at[:, 5].set(_normal((2, 40), 0))
    transform = transforms.scale_by_golore(
      RANK, random_after=1, basis=transforms.svd(), refresh_every=1, moments='keep'
    )
    runs = [np.asarray(state.left['w']) for _, state in _run(transform, [gradient] * 3)]
    np.testing.assert_allclose(np.linalg.norm(runs[0][:, 5], axis=-1), 1, atol=1e-5)
    for basis in runs[1:]:
      gram = np.swapaxes(basis, 1, 2) @ basis
      np.testing.assert_allclose(gram, np.broadcast_to(np.eye(RANK), gram.shape), atol=1e-5)
      # A random subspace holds an eighth of any direction's energy, give or take.
      assert np.all(np.linalg.norm(basis[:, 5], axis=-1) < 0.9)
    units = [runs[1][0], runs[1][1], runs[2][0], runs[2][1]]
    overlaps = [np.linalg.norm(a.T @ b) for i, a in enumerate(units) for b in units[:i]]
    # Of the norm 2 that equal subspaces of dimension 4 would have.
    assert max(overlaps) < 1.6

  def test_random_subspaces_are_uniform(self):
    keys = jax.random.split(jax.random.key(0), 200)
    draw = lambda key: transforms.random_subspace().refresh(None, jnp.eye(8, 2), key, 0)
    bases = np.asarray(jax.jit(jax.vmap(draw))(keys))
    # E[P P^T] = (r / m) I; an entry's standard deviation is below 0.2.
    mean = np.mean(bases @ np.swapaxes(bases, 1, 2), axis=0)
    np.testing.assert_allclose(mean, np.eye(8) / 4, atol=4 * 0.2 / np.sqrt(200))


class TestPacked:
  @pytest.mark.parametrize('axis', [-2, -1], ids=['columns', 'rows'])
  @pytest.mark.parametrize(('bits', 'block'), [(8, 128), (4, 128), (4, 3), (8, 4)])
  def test_entries_come_back_to_half_a_step_of_their_block(self, bits, block, axis):
    rank, size = 10, 24
    basis = _normal((3, size, rank), 0)
    kept = storage.packed(bits, block).pack(basis if axis == -2 else basis.mT, axis)
    back = storage.unpack(kept, axis)
    back = np.asarray(back if axis == -2 else back.mT)
    blocks = -(-rank // block)
    edges = range(0, rank, -(-rank // blocks))
    largest = np.maximum.reduceat(np.abs(np.asarray(basis)), list(edges), axis=-1)
    step = np.repeat(largest, -(-rank // blocks), axis=-1)[..., :rank] / (2 ** (bits - 1) - 1)
    assert np.all(np.abs(back - basis) <= step / 2 * (1 + 1e-5))
    assert kept[0].size * kept[0].dtype.itemsize == 3 * size * rank * bits // 8
    assert kept[1].size == 3 * size * blocks
    # Long axes stay in place, and what is rounded stays as it is.
    assert {part.shape[axis] for part in kept} == {size}
    again = storage.packed(bits, block).pack(storage.unpack(kept, axis), axis)
    jax.tree.map(np.testing.assert_array_equal, again, kept)

  def test_the_first_basis_is_kept_exactly(self):
    # `subspace_iteration` recognises the identity.
    for bits in (4, 8):
      kept = storage.packed(bits).pack(jnp.eye(9, 4), -2)
      np.testing.assert_array_equal(storage.unpack(kept, -2), np.eye(9, 4))

  def test_projecting_and_projecting_back_use_the_rounded_basis(self):
    transform = transforms.scale_by_q_galore(RANK, basis=transforms.svd(), scale=1.0)
    gradient = _normal((8, 12), 0)
    ((update, state),) = _run(transform, [gradient])
    basis = np.asarray(storage.unpack((state.left.codes['w'], state.left.scales['w']), -2))
    projected = basis.T @ gradient
    np.testing.assert_allclose(state.inner.mu['w'], 0.1 * projected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(update, basis @ np.sign(projected), atol=1e-4)

  @pytest.mark.parametrize(
    ('make', 'message'),
    [
      (lambda: transforms.packed(bits=2), '4 or 8'),
      (lambda: transforms.packed(block=0), 'at least 1'),
      (lambda: transforms.scale_by_q_galore(3).init({'w': jnp.zeros((8, 8))}), 'even'),
    ],
  )
  def test_what_cannot_be_packed_is_refused(self, make, message):
    with pytest.raises(ValueError, match=message):
      make()


class TestLazy:
  def test_resting_matrices_refresh_less_often_and_moving_ones_do_not(self):
    rng = np.random.default_rng(0)
    rest = rng.standard_normal((6, 9))
    # Leading vectors of the second matrix: a coordinate at a time, each orthogonal to the last.
    turn = [5.0 * np.eye(6)[:, [step % 6]] @ rng.standard_normal((1, 9)) for step in range(14)]
    gradients = [jnp.asarray(np.stack([rest, moving]), jnp.float32) for moving in turn]
    transform = transforms.project(
      optax.identity(),
      1,
      refresh_every=1,
      basis=transforms.svd(),
      interval=transforms.lazy(threshold=0.5, growth=2, history=2),
      stagger=False,
    )
    states = [state for _, state in _run(transform, gradients)]
    intervals_ = np.stack([state.interval.interval['w'] for state in states])
    # Refreshes of the first at 0, 1, 2, then every 2: 4, 6, then every 4: 10, 14.
    np.testing.assert_array_equal(intervals_[:, 0], [1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4])
    np.testing.assert_array_equal(intervals_[:, 1], 1)
    due = np.stack([state.interval.due['w'] for state in states])
    np.testing.assert_array_equal(due[:, 0], [1, 2, 4, 4, 6, 6, 10, 10, 10, 10, 14, 14, 14, 14])
    moved = [np.asarray(state.left['w'][1]) for state in states]
    assert all(np.any(a != b) for a, b in itertools.pairwise(moved))

  def test_second_bases_are_spread_as_fixed_ones_are(self):
    lazy, fixed = intervals.lazy(), intervals.fixed()
    plan = Plan('w', True, False, 2, units=5, first=3, total=8)
    leaf = jnp.zeros((5, 6, 9))
    clock = functools.partial(intervals.Clock, plan, 0, refresh_every=4, stagger=True)
    held, basis = lazy.init(leaf, plan, 4), jnp.eye(6, 2)
    start = clock(jnp.int32(0))
    each = [lazy.after(start, unit, [x[unit] for x in held], basis, basis) for unit in range(5)]
    for count in range(1, 5):
      low, high, _ = fixed.due(clock(jnp.int32(count)), ())
      due = [unit for unit in range(5) if each[unit][1] == count]
      assert due == list(range(int(low), int(high)))

  def test_growth_below_one_is_refused(self):
    with pytest.raises(ValueError, match='growth'):
      transforms.lazy(growth=0.5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'lift': lifts.rescale}, r'back\(\)'),
    ({'storage': 4}, r'packed\(\)'),
    ({'interval': 'lazy'}, r'lazy\(\)'),
    ({'lift': lifts.rescale(), 'side': 'both'}, 'of one side'),
    ({'basis': transforms.random_projection(), 'moments': 'rotate'}, 'rotate'),
    ({'basis': transforms.random_projection(), 'interval': transforms.lazy()}, 'interval'),
  ],
)
def test_choices_at_odds_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    transforms.project(optax.identity(), 2, **options)


def test_fira_can_leave_a_share_of_the_projection_in_the_rest():
  gradient = {'w': jnp.asarray(np.random.default_rng(0).standard_normal((6, 9)), jnp.float32)}

  @jax.jit
  def first(gradient):
    made = [
      transforms.scale_by_fira(2, basis=transforms.svd(), growth=1e9, removed=removed)
      for removed in (0.0, 0.25, 1.0)
    ]
    return [each.update(gradient, each.init(gradient))[0]['w'] for each in made]

  none, quarter, all_ = first(gradient)
  np.testing.assert_allclose(quarter, 0.75 * none + 0.25 * all_, atol=1e-5)
  assert np.linalg.matrix_rank(np.asarray(none - all_), rtol=1e-4) == 2


@pytest.mark.parametrize('name', ['golore', 'fira', 'q_galore', 'q_galore8bit'])
def test_a_config_cannot_ask_for_a_basis_that_is_not_kept(name):
  arguments = {'random_after': 10} if name == 'golore' else {}
  with pytest.raises(ValueError, match='drawn anew'):
    optimizers.OPTIMIZERS[name](1e-3, rank=2, basis='random', **arguments)


def test_factors_are_shared_by_channels_or_tensors():
  with pytest.raises(ValueError, match='tensor'):
    transforms.rescale('row')
