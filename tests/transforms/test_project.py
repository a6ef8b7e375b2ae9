"""`project` against its definition: when bases change, what they capture, what state becomes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from memjax import transforms
from tests import hlo

RANK = 4


def _drifting(shape, steps, turn=0.005, seed=0):
  """Gradients whose singular vectors turn slowly, with a spectrum that falls by 0.6."""
  rng = np.random.default_rng(seed)
  *batch, m, n = shape
  side = min(m, n)
  left = rng.standard_normal((*batch, m, side))
  right = rng.standard_normal((*batch, n, side))
  for _ in range(steps):
    left = np.linalg.qr(left + turn * rng.standard_normal(left.shape))[0]
    right = np.linalg.qr(right + turn * rng.standard_normal(right.shape))[0]
    matrix = (left * 0.6 ** np.arange(side)) @ np.swapaxes(right, -1, -2)
    yield jnp.asarray(matrix, jnp.float32)


def _changed(old, new):
  """Units whose basis differs, as a list of bools a leaf."""
  changed = lambda a, b: np.any(np.asarray(a) != np.asarray(b), axis=(-2, -1)).ravel().tolist()
  return jax.tree.leaves(jax.tree.map(changed, old, new))


def test_every_unit_refreshes_once_a_period_and_never_many_at_once():
  params = {'a': jnp.zeros((5, 8, 12)), 'b': jnp.zeros((12, 8)), 'c': jnp.zeros((2, 3, 8, 8))}
  units, period = 5 + 1 + 6, 5
  optimizer = transforms.project(optax.identity(), 2, refresh_every=period)
  update = jax.jit(optimizer.update)
  state = optimizer.init(params)
  refreshed = []
  for step in range(2 * period + 1):
    keys = dict(zip(params, jax.random.split(jax.random.key(step), 3)))
    gradient = {k: jax.random.normal(keys[k], x.shape) for k, x in params.items()}
    _, after = update(gradient, state)
    refreshed.append(_changed((state.left, state.right), (after.left, after.right)))
    state = after
  assert all(refreshed[0])
  np.testing.assert_array_equal(np.sum(refreshed[1 : period + 1], axis=0), np.ones(units))
  np.testing.assert_array_equal(np.sum(refreshed[period + 1 :], axis=0), np.ones(units))
  assert np.sum(refreshed[1:], axis=1).max() == -(-units // period)


def test_without_stagger_all_units_refresh_together():
  params = {'a': jnp.zeros((3, 6, 8)), 'b': jnp.zeros((8, 6))}
  optimizer = transforms.project(optax.identity(), 2, refresh_every=2, stagger=False)
  update = jax.jit(optimizer.update)
  state = optimizer.init(params)
  for step in range(4):
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(step), x.shape), params)  # noqa: B023
    _, after = update(gradient, state)
    changed = _changed((state.left, state.right), (after.left, after.right))
    assert changed == [step % 2 == 0] * 4
    state = after


def test_staggered_bases_capture_what_the_best_ones_would():
  """With identity inside, the update is the gradient's part in the subspace."""
  optimizer = transforms.project(optax.identity(), RANK, refresh_every=3)
  update = jax.jit(optimizer.update)
  state = optimizer.init({'w': jnp.zeros((3, 16, 24))})
  for gradient in _drifting((3, 16, 24), 12):
    updates, state = update({'w': gradient}, state)
    best = np.sum(np.linalg.svd(gradient, compute_uv=False)[:, :RANK] ** 2, axis=-1)
    captured = np.sum(np.square(updates['w']), axis=(-2, -1))
    # At most two updates old.
    assert np.all(captured > 0.99 * best)
    assert np.all(np.linalg.matrix_rank(np.asarray(updates['w']), rtol=1e-5) == RANK)


def test_refreshed_bases_capture_999_thousandths():
  optimizer = transforms.project(optax.identity(), RANK, refresh_every=1)
  update = jax.jit(optimizer.update)
  state = optimizer.init({'w': jnp.zeros((3, 24, 16))})
  for gradient in _drifting((3, 24, 16), 12):
    updates, state = update({'w': gradient}, state)
    best = np.sum(np.linalg.svd(gradient, compute_uv=False)[:, :RANK] ** 2, axis=-1)
    assert np.all(np.sum(np.square(updates['w']), axis=(-2, -1)) > 0.999 * best)


def test_stacked_layers_are_projected_as_separate_matrices_are():
  stacked = list(_drifting((3, 16, 24), 5))
  make = lambda: transforms.project(
    optax.scale_by_adam(), RANK, refresh_every=2, stagger=False, basis=transforms.svd()
  )
  together, apart = make(), make()
  state = together.init({'w': stacked[0]})
  states = apart.init(dict(zip('abc', stacked[0])))
  for gradient in stacked:
    updates, state = together.update({'w': gradient}, state)
    each, states = apart.update(dict(zip('abc', gradient)), states)
    np.testing.assert_allclose(updates['w'], np.stack(list(each.values())), atol=1e-5)


@pytest.mark.parametrize('side', ['left', 'right', 'both'])
def test_rotated_moments_stand_for_the_same_gradients(side):
  """After a refresh, a rotated first moment is the old one seen from the new basis."""
  first, second = _drifting((2, 12, 16), 2, turn=0.1)
  optimizer = transforms.project(
    optax.scale_by_adam(),
    RANK,
    side=side,
    refresh_every=1,
    moments='rotate',
    basis=transforms.svd(),
  )
  state = optimizer.init({'w': first})
  _, old = optimizer.update({'w': first}, state)
  _, new = optimizer.update({'w': second}, old)
  mu, nu = np.asarray(old.inner.mu['w']), np.asarray(old.inner.nu['w'])
  gradient = np.asarray(second)
  if side != 'right':
    turn = np.swapaxes(new.left['w'], -1, -2) @ old.left['w']
    mu, nu = turn @ mu, turn**2 @ nu
    gradient = np.swapaxes(new.left['w'], -1, -2) @ gradient
  if side != 'left':
    turn = new.right['w'] @ np.swapaxes(old.right['w'], -1, -2)
    mu, nu = mu @ np.swapaxes(turn, -1, -2), nu @ np.swapaxes(turn**2, -1, -2)
    gradient = gradient @ np.swapaxes(new.right['w'], -1, -2)
  np.testing.assert_allclose(new.inner.mu['w'], 0.9 * mu + 0.1 * gradient, atol=1e-6)
  np.testing.assert_allclose(new.inner.nu['w'], 0.999 * nu + 0.001 * gradient**2, atol=1e-7)
  assert np.abs(new.inner.mu['w'] - (0.9 * old.inner.mu['w'] + 0.1 * gradient)).max() > 1e-3


def test_update_copies_neither_stacked_bases_nor_gradients():
  params = {'w': jnp.zeros((3, 24, 40))}
  optimizer = transforms.project(optax.trace(0.9), RANK)
  state = jax.eval_shape(optimizer.init, params)
  step = jax.jit(optimizer.update, donate_argnums=1)
  compiled = step.lower(params, state).compile()
  copies = [line for line in compiled.as_text().splitlines() if ' copy(' in line]
  assert not [line for line in copies if 'f32[3,24,40]' in line or 'f32[3,24,4]' in line]
  # Refreshes work on one matrix at a time: a few of its size, not the stack's three.
  assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * 24 * 40


def test_optax_can_map_the_state_as_parameters():
  params = {'w': jnp.zeros((6, 8)), 'b': jnp.zeros(6)}
  optimizer = transforms.galore(0.1, 2)
  state = optimizer.init(params)
  marked = optax.tree.map_params(optimizer, lambda x: x + 1, state)
  np.testing.assert_array_equal(marked[0].inner.mu['w'], np.ones((2, 8)))
  assert marked[0].count == 0


def test_gradients_that_are_not_finite_leave_the_bases():
  optimizer = transforms.project(optax.identity(), 2, refresh_every=1)
  update = jax.jit(optimizer.update)
  state = optimizer.init({'w': jnp.zeros((2, 6, 8))})
  gradient = jax.random.normal(jax.random.key(0), (2, 6, 8))
  _, state = update({'w': gradient}, state)
  _, after = update({'w': gradient.at[1, 0, 0].set(jnp.nan)}, state)
  assert _changed(state.left, after.left) == [True, False]
  assert np.all(np.isfinite(after.left['w']))
  _, after = update({'w': jnp.full_like(gradient, jnp.inf)}, state)
  assert _changed(state.left, after.left) == [False, False]


def test_leaves_without_a_subspace_get_the_inner_transform_whole():
  params = {
    'blocks': {'q': {'kernel': jnp.ones((6, 8))}},
    'small': jnp.ones((3, 2)),
    'b': jnp.ones(5),
  }
  optimizer = transforms.project(optax.scale_by_rms(), 4, scale=100.0)
  updates, state = optimizer.update(params, optimizer.init(params))
  expected, _ = optax.scale_by_rms().update(params, optax.scale_by_rms().init(params))
  for name in ('small', 'b'):
    np.testing.assert_array_equal(updates[name], expected[name])
    assert state.left[name] == optax.MaskedNode()
  assert state.inner.nu['blocks']['q']['kernel'].shape == (4, 8)


def test_default_targets_choose_the_layers_of_a_stacked_model():
  shapes = {
    'embed': {'embedding': (32, 8)},
    'blocks': {
      'attn_norm': {'scale': (4, 8)},
      'attn': {'q': {'kernel': (4, 8, 8), 'bias': (4, 8)}},
      'mlp': {'up': {'kernel': (4, 8, 16)}, 'down': {'kernel': (4, 16, 8)}},
    },
    'final_norm': {'scale': (8,)},
    'head': {'kernel': (8, 32)},
    'lm_head': {'kernel': (8, 32)},
    'wte': (32, 8),
    'multi_head_mixer': {'kernel': (8, 8)},
  }
  params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
  state = jax.eval_shape(transforms.scale_by_galore(4).init, params)
  projected = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path((state.left, state.right))
  }
  assert {path[2:] for path in projected} == {
    'blocks/attn/q/kernel',
    'blocks/mlp/up/kernel',
    'blocks/mlp/down/kernel',
    'multi_head_mixer/kernel',
  }


def test_extra_arguments_reach_the_inner_transform():
  def update(updates, state, params=None, *, factor):
    return jax.tree.map(lambda u: factor * u, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  optimizer = transforms.project(inner, 2)
  gradient = {'w': next(_drifting((6, 8), 1))}
  state = optimizer.init(gradient)
  once, _ = optimizer.update(gradient, state, factor=1.0)
  thrice, _ = optimizer.update(gradient, state, factor=3.0)
  np.testing.assert_allclose(thrice['w'], 3 * once['w'], atol=1e-6)


def test_numbers_can_be_injected_as_hyperparameters():
  make = optax.inject_hyperparams(transforms.galore, static_args=('rank',))
  gradient = {'w': next(_drifting((6, 8), 1))}
  optimizer = make(learning_rate=optax.linear_schedule(0.0, 1.0, 1), rank=2, refresh_every=7)
  state = optimizer.init(gradient)
  update = jax.jit(optimizer.update)
  first, state = update(gradient, state, gradient)
  second, _ = update(gradient, state, gradient)
  np.testing.assert_array_equal(first['w'], 0)
  plain = transforms.galore(learning_rate=1.0, rank=2, refresh_every=7)
  _, state = plain.update(gradient, plain.init(gradient), gradient)
  expected, _ = plain.update(gradient, state, gradient)
  np.testing.assert_allclose(second['w'], expected['w'], atol=1e-5)


class TestSharding:
  SHAPE = (3, 16, 32)

  @staticmethod
  def _compile(optimizer, params, mesh, spec):
    def sharding(x):
      if x.ndim < len(spec):
        return NamedSharding(mesh, PartitionSpec())
      whole = [axis if size != RANK else None for axis, size in zip(spec, x.shape)]
      return NamedSharding(mesh, PartitionSpec(*whole))

    state = jax.eval_shape(optimizer.init, params)
    shardings = jax.tree.map(sharding, (params, state))
    step = jax.jit(optimizer.update, in_shardings=shardings, out_shardings=shardings)
    return step.lower(params, state).compile().as_text()

  @pytest.mark.parametrize('axes', [('fsdp', 'tensor'), (None, 'fsdp'), ('fsdp', None)], ids=str)
  def test_no_collective_carries_a_matrix(self, axes):
    mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
    optimizer = transforms.project(optax.scale_by_adam(), RANK, refresh_every=3)
    text = self._compile(optimizer, {'w': jnp.zeros(self.SHAPE)}, mesh, PartitionSpec(None, *axes))
    moved = hlo.collectives(text)
    assert moved
    # The projected gradient of all layers is the largest: 3 * 4 * 32, below one matrix.
    layers, m, n = self.SHAPE
    assert max(map(hlo.elements, moved)) <= layers * RANK * n < m * n

  def test_the_reader_of_collectives_finds_what_optax_gathers(self):
    mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
    optimizer = optax.contrib.scale_by_galore(RANK)
    text = self._compile(
      optimizer, {'w': jnp.zeros(self.SHAPE[1:])}, mesh, PartitionSpec('fsdp', None)
    )
    assert max(map(hlo.elements, hlo.collectives(text))) >= 16 * 32

  def test_explicit_axes_give_the_same_updates_and_keep_their_shardings(self):
    optimizer = transforms.project(optax.scale_by_adam(), RANK, refresh_every=2)
    gradients = [{'w': g, 'b': g[0, 0]} for g in _drifting(self.SHAPE, 3)]
    state = optimizer.init(gradients[0])
    mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Explicit,) * 2)
    specs = {'w': PartitionSpec(None, 'fsdp', 'tensor'), 'b': PartitionSpec('fsdp')}
    specs = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    plain = jax.jit(optimizer.update)
    with jax.set_mesh(mesh):
      other = jax.jit(optimizer.init)(jax.device_put(gradients[0], specs))
      assert jax.typeof(other.left['w']).sharding.spec == PartitionSpec(None, 'fsdp', None)
      assert jax.typeof(other.inner.mu['w']).sharding.spec == PartitionSpec(None, None, 'tensor')
    types = jax.tree.map(jax.typeof, other)
    sharded = jax.jit(optimizer.update)
    for gradient in gradients:
      expected, state = plain(gradient, state)
      with jax.set_mesh(mesh):
        updates, other = sharded(jax.device_put(gradient, specs), other)
      assert jax.tree.map(jax.typeof, other) == types
      assert updates['w'].sharding.spec == specs['w'].spec
      # Sums in another order, see the contract test.
      np.testing.assert_allclose(updates['w'], expected['w'], atol=2e-4)


class TestRefusals:
  def _init(self, optimizer):
    optimizer.init({'blocks': {'q': {'kernel': jnp.zeros((6, 8))}}, 'bias': jnp.zeros(6)})

  @pytest.mark.parametrize('rank', [0, -1, 2.0, True, '4'])
  def test_rank_must_be_a_positive_int(self, rank):
    with pytest.raises(ValueError, match='rank must be a positive int'):
      transforms.project(optax.identity(), rank)

  def test_array_rank_names_static_args(self):
    make = optax.inject_hyperparams(transforms.galore)
    with pytest.raises(ValueError, match=r"static_args=\('rank'"):
      self._init(make(learning_rate=0.1, rank=4))

  def test_no_subspace_anywhere_names_leaf_shape_and_way_out(self):
    with pytest.raises(
      ValueError, match=r'blocks/q/kernel: shape \(6, 8\) has no subspace of rank 7.*lower'
    ):
      self._init(transforms.project(optax.identity(), 7))

  def test_pattern_without_a_match_names_the_nearest_path(self):
    with pytest.raises(ValueError, match='blocks/q/kernel'):
      self._init(transforms.project(optax.identity(), 2, targets='blocks/k/kernel'))

  def test_unknown_moments_are_not_rotated(self):
    with pytest.raises(ValueError, match='nu_max'):
      self._init(transforms.project(optax.scale_by_amsgrad(), 2, moments='rotate'))

  @pytest.mark.parametrize('kind', ['dynamic', 'fp8'])
  def test_codes_are_not_rotated(self, kind):
    inner = transforms.quantize_state(optax.scale_by_adam(), kind=kind, min_size=8)
    optimizer = transforms.project(inner, 2, moments='rotate')
    with pytest.raises(ValueError, match=r"inner.mu\['w'\].*quantised.*use moments='keep'"):
      jax.eval_shape(optimizer.init, {'w': jnp.zeros((6, 8))})

  @pytest.mark.parametrize(
    ('options', 'message'),
    [
      ({'side': 'top'}, 'side must be one of'),
      ({'moments': 'reset'}, "'keep' or 'rotate'"),
      ({'refresh_every': 0}, 'at least 1'),
      ({'basis': transforms.svd}, r'svd\(\)'),
    ],
  )
  def test_options_out_of_range(self, options, message):
    with pytest.raises(ValueError, match=message):
      transforms.project(optax.identity(), 2, **options)
