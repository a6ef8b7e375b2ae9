"""Estimators on functions with closed forms: golden slopes in f64, means, norms, and what chains
make of them.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memjax
from memjax import estimators, optimizers, weights
from memjax.estimators.leaves import describe
from memjax.estimators.low_rank import _RIGHT, _factor, orthonormal, square_sides

SHAPES = {'bias': (3,), 'blocks': {'w': (2, 4, 6)}}  # Few leaves, which compile soon.
is_shape = lambda x: isinstance(x, tuple)
# Slopes are f64. Noise is f32, and two programs that LLVM does not optimise, as under these tests,
# round it alike only before JAX 0.11.
EXACT = 1e-10 if jax.__version_info__ < (0, 11) else 1e-6
ESTIMATORS = {
  'gaussian': lambda **k: estimators.spsa(0.1, **k),
  'rademacher': lambda **k: estimators.spsa(0.1, noise='rademacher', **k),
  'sphere': lambda **k: estimators.spsa(0.1, noise='sphere', **k),
  'lozo_code': lambda **k: estimators.lozo(2, 0.1, scale='code', refresh_every=3, **k),
  'lozo': lambda **k: estimators.lozo(2, 0.1, refresh_every=3, **k),
  'subzero': lambda **k: estimators.subzero(2, 0.1, refresh_every=3, **k),
  'reshaped': lambda **k: estimators.subzero(2, 0.1, refresh_every=3, reshape=True, **k),
  'forward': lambda **k: estimators.forward_gradient(**k),
  'sparse': lambda **k: estimators.spsa(
    0.1, noise=estimators.sparse(estimators.gaussian, 0.5), **k
  ),
}


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def draw(seed, dtype=float):
  rng = np.random.default_rng(seed)
  make = lambda shape: jnp.asarray(rng.standard_normal(shape), dtype)
  return jax.tree.map(make, SHAPES, is_leaf=is_shape)


def quadratic(params):
  """`|params - a|^2 / 2`, whose differences are exact and whose gradient is `params - a`."""
  return 0.5 * sum(jnp.sum((x - a) ** 2) for x, a in zip(*map(jax.tree.leaves, (params, draw(1)))))


def product(x, y):
  return sum(float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y)))


def update(transform):
  """Returns the compiled `update` on the quadratic."""

  @jax.jit
  def run(params, state):
    read = lambda tree: jax.tree.map(weights.materialize, tree, is_leaf=weights.is_weight)
    return transform.update(None, state, params, value_fn=lambda p: quadratic(read(p)))

  return run


@pytest.mark.parametrize(
  ('name', 'form'),
  [*((name, 'arrays') for name in ESTIMATORS), ('gaussian', 'weights'), ('lozo', 'weights')],
)
def test_a_slope_is_the_gradient_along_what_is_handed_on(name, form, x64):
  """For a quadratic the difference is exact: estimate = <gradient, z> z."""
  transform = ESTIMATORS[name](form=form)
  params, run = draw(0), update(transform)
  gradient = jax.tree.map(lambda x, a: x - a, params, draw(1))
  state, seen = transform.init(params), []
  for number in range(2):
    estimate, state = run(params, state)
    slope = float(state.slopes[0, 0])
    z = jax.tree.map(lambda e, slope=slope: e / slope, estimate)
    if name == 'lozo':  # Divided by its rank on matrices.
      z = {'bias': z['bias'], 'blocks': {'w': 2 * z['blocks']['w']}}
    # On the sphere slopes multiply unscaled noise.
    factor = 51 / product(z, z) if name == 'sphere' else 1
    np.testing.assert_allclose(slope, product(gradient, z) * factor, rtol=EXACT)
    assert int(state.count) == number + 1
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(estimate))
    seen.append(z)
  assert product(seen[0], seen[1]) / product(seen[0], seen[0]) < 0.9  # Not the same direction.


DRAWS = 4000


@functools.cache
def many(name, draws):
  """Estimates of so many numbers, each flattened `[draws, d]`, and the gradient `[d]`."""
  transform = ESTIMATORS[name]()
  params = draw(0, np.float32)
  state = transform.init(params)
  flat = lambda tree: jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])

  @jax.jit
  def run(count):
    # The first of a period each, so that factors which are kept are drawn anew.
    start = state._replace(count=count * 3)
    estimate, after = transform.update(None, start, params, value_fn=quadratic)
    return flat(estimate), after.slopes[0, 0]

  found, slopes = jax.lax.map(run, jnp.arange(draws))
  gradient = jax.tree.map(lambda x, a: x - a, params, draw(1, np.float32))
  return np.asarray(found, np.float64), np.asarray(slopes), np.asarray(flat(gradient))


QUICK = [(name, DRAWS) for name in ('gaussian', 'lozo_code', 'subzero')]
SLOW = [
  pytest.param(name, 100_000, marks=pytest.mark.slow)
  for name in ('gaussian', 'sphere', 'lozo', 'lozo_code', 'subzero', 'reshaped')
]


@pytest.mark.parametrize(('name', 'draws'), [*QUICK, *SLOW])
def test_the_mean_is_the_gradient_and_norms_are_as_stated(name, draws):
  """Within four standard errors; LOZO's code has `r` times the gradient."""
  found, slopes, gradient = many(name, draws)
  vectors = np.arange(3)  # The bias comes first.
  expected = gradient * (2 if name == 'lozo_code' else 1)
  expected[vectors] = gradient[vectors]
  error = found.mean(0) - expected
  bound = found.std(0) / draws**0.5
  assert (np.abs(error) < 4.5 * bound).all()
  # One number for all: the share of the gradient in the mean.
  share = found @ expected / (expected @ expected)
  assert abs(share.mean() - 1) < 4 * share.std() / draws**0.5
  squares = ((found / slopes[:, None]) ** 2)[:, 3:].sum(1)
  matrices = 2 * 4 * 6
  wanted = {'lozo_code': 2 * matrices, 'lozo': matrices / 2}.get(name, matrices)
  assert abs(squares.mean() - wanted) < 4 * squares.std() / draws**0.5


def test_forward_mode_is_the_limit_of_two_sides():
  found, _, _ = many('forward', DRAWS)
  two, _, _ = many('gaussian', DRAWS)
  np.testing.assert_allclose(found, two, rtol=1e-3, atol=1e-3 * np.abs(two).max())


def test_samples_are_averaged_from_the_same_parameters(x64):
  single, several = estimators.spsa(0.1), estimators.spsa(0.1, samples=4)
  params, run = draw(0), update(single)
  together, after = update(several)(params, several.init(params))
  state, alone = single.init(params), []
  for _ in range(4):
    estimate, state = run(params, state)
    alone.append(estimate)
  mean = jax.tree.map(lambda *x: sum(x) / 4, *alone)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=EXACT, atol=EXACT / 100)
  jax.tree.map(near, together, mean)
  assert after.slopes.shape == (4, 1)


def test_one_side_differs_by_the_curvature(x64):
  """For a quadratic the one-sided slope is the two-sided plus `eps |z|^2 / 2`."""
  one, two = estimators.spsa(0.1, sides=1), estimators.spsa(0.1)
  params = draw(0)
  _, state = update(one)(params, one.init(params))
  estimate, other = update(two)(params, two.init(params))
  slope = float(other.slopes[0, 0])
  curved = 0.1 / 2 * product(estimate, estimate) / slope**2
  np.testing.assert_allclose(state.slopes[0, 0] - slope, curved, rtol=EXACT)


def test_blockwise_has_a_slope_for_every_layer_and_other_key(x64):
  transform = estimators.spsa(0.1, blockwise=True)
  params = draw(0)
  estimate, state = update(transform)(params, transform.init(params))
  assert state.slopes.shape == (1, 3)
  gradient = jax.tree.map(lambda x, a: x - a, params, draw(1))
  parts = lambda t: [t['bias'], *t['blocks']['w']]
  for slope, g, e in zip(state.slopes[0], parts(gradient), parts(estimate), strict=True):
    np.testing.assert_allclose(slope**2, product(g, e), rtol=EXACT)


def test_targets_leave_the_others_alone():
  transform = memjax.mezo(0.1, targets=lambda path: path.startswith('blocks'))
  params = draw(0, np.float32)
  still = lambda p: jnp.all(p['bias'] == params['bias'])
  seen = lambda p: quadratic(p) + jnp.where(still(p), 0, jnp.nan)
  run = jax.jit(functools.partial(transform.update, None, value_fn=seen))
  updates, state = run(transform.init(params), params)
  assert int(state[0].skipped) == 0
  np.testing.assert_array_equal(updates['bias'], 0)
  assert float(jnp.abs(updates['blocks']['w']).min()) > 0


def test_what_is_left_out_may_be_of_any_type_and_does_not_decay():
  params = {'ids': jnp.arange(3), 'scale': jnp.ones(2), 'w': 2.0}  # Also a Python number.
  targets = lambda path: path == 'w'
  transform = memjax.mezo(0.1, targets=targets, weight_decay=0.5)
  loss = lambda params: (params['w'] - 1) ** 2
  updates, _ = transform.update(None, transform.init(params), params, value_fn=loss)
  after = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(after['ids'], params['ids'])
  assert after['ids'].dtype == params['ids'].dtype
  np.testing.assert_array_equal(after['scale'], params['scale'])
  assert after['w'] != params['w']


def test_a_list_of_layers_is_no_stack():
  """Its matrices are matrices, not rows of layers."""
  params = {'blocks': [{'w': jnp.ones((3, 4))}, {'w': jnp.ones((3, 4))}]}
  leaves = list(describe(params, 'blocks', False, None))
  assert all(leaf.layers is None and leaf.matrix for leaf in leaves)
  transform = memjax.lozo(0.1, 1)
  loss = lambda params: sum(jnp.sum(layer['w'] ** 2) for layer in params['blocks'])
  updates, _ = transform.update(None, transform.init(params), params, value_fn=loss)
  assert np.linalg.matrix_rank(updates['blocks'][0]['w']) == 1


def test_the_better_of_two_steps_is_not_one_without_a_value():
  """Beyond 2 the loss is no number: steps that lead there are not taken."""
  transform = memjax.zo_sgd_conservative(100.0, 0.1)
  loss = lambda w: jnp.where(jnp.abs(w) < 2, (w - 1) ** 2, jnp.nan)
  update, _ = transform.update(None, transform.init(jnp.float32(0)), jnp.float32(0), value_fn=loss)
  assert jnp.isfinite(loss(update))


def test_moments_computed_anew_are_adams():
  """While the window holds all updates; then the oldest fall out."""
  dense, anew = memjax.zo_adam(0.01, b2=0.99), memjax.mezo_adam(0.01, window=4, b2=0.99)
  runs = []
  for transform in (dense, anew):

    @jax.jit
    def step(params, state, transform=transform):
      updates, state = transform.update(None, state, params, value_fn=quadratic)
      return optax.apply_updates(params, updates), state

    params = draw(0, np.float32)
    state, path = transform.init(params), []
    for _ in range(6):
      params, state = step(params, state)
      path.append(params)
    runs.append(path)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  jax.tree.map(near, runs[0][3], runs[1][3])
  apart = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), runs[0][5], runs[1][5])
  assert max(jax.tree.leaves(apart)) > 1e-4


def test_conservative_descent_never_climbs():
  """With a learning rate of `2 / d`, at which half of the steps overshoot the valley."""
  values = {}
  for name, make in (('plain', memjax.mezo), ('conservative', memjax.zo_sgd_conservative)):
    transform = make(0.04)

    @jax.jit
    def step(params, state, transform=transform):
      updates, state = transform.update(None, state, params, value_fn=quadratic)
      return optax.apply_updates(params, updates), state

    params = draw(0, np.float32)
    state, values[name] = transform.init(params), [float(quadratic(params))]
    for _ in range(30):
      params, state = step(params, state)
      values[name].append(float(quadratic(params)))
  assert (np.diff(values['conservative']) <= 1e-5).all()
  assert values['conservative'][-1] < values['conservative'][0]
  assert (np.diff(values['plain']) > 0).any()


def test_the_sign_is_of_every_number():
  transform = memjax.zo_sgd_sign(0.5)
  params = draw(0, np.float32)
  updates, _ = update(transform)(params, transform.init(params))
  assert {float(x) for x in np.unique(np.abs(updates['blocks']['w']))} == {0.5}


@pytest.mark.parametrize('every', [2, pytest.param(1, marks=pytest.mark.slow)])
def test_lozo_m_moves_its_momentum_into_the_next_subspace(every, x64):
  """N <- N V_old^T V_new / n at a change of V, then the average with `g U`; also at each step."""
  rank, beta, params = 2, 0.8, draw(0)
  with_n = estimators.lozo(rank, 0.1, refresh_every=every, momentum=beta)
  plain = estimators.lozo(rank, 0.1, refresh_every=every, scale='code')
  state, other = with_n.init(params), plain.init(params)
  run, run_plain = update(with_n), update(plain)
  n, old = np.zeros((4, rank)), None
  for number in range(3):
    estimate, state = run(params, state)
    slope_times_uv, other = run_plain(params, other)
    np.testing.assert_allclose(state.slopes, other.slopes, rtol=1e-10)
    v = _right_factor(params, number // every, rank)
    if number:
      assert (v != old).any() == (number % every == 0)
    if number and number % every == 0:
      n = n @ old.T @ v / 6
    # The first layer's U is the one that gives its U V^T with this V.
    gu = np.asarray(slope_times_uv['blocks']['w'][0]) @ v @ np.linalg.inv(v.T @ v)
    n, old = beta * n + (1 - beta) * gu, v
    np.testing.assert_allclose(estimate['blocks']['w'][0], n @ v.T / rank, rtol=1e-5, atol=1e-6)


def _right_factor(params, period, rank):
  """V of the first layer of blocks/w."""
  leaf = next(leaf for leaf in describe(params, 'blocks', False, None) if leaf.matrix)
  return np.asarray(_factor(leaf, jax.random.key(0), _RIGHT, period, 6, rank)[0], np.float64)


def test_a_period_of_lozo_stays_in_one_subspace_and_every_step_draws_u():
  transform = estimators.lozo(1, 0.1, refresh_every=3)
  params, run = draw(0, np.float32), update(transform)
  state, found = transform.init(params), []
  for _ in range(4):
    estimate, state = run(params, state)
    found.append(np.asarray(estimate['blocks']['w'][0]))
  rank = lambda parts, axis: np.linalg.matrix_rank(np.concatenate(parts, axis), tol=1e-4)
  assert rank(found[:3], 0) == 1  # Rows are multiples of one V^T.
  assert rank(found, 0) == 2
  assert rank(found[:3], 1) == 3  # Columns of three U.


def test_orthonormal_factors_are_uniform():
  """Of 2 x 1 factors, both signs: QR alone gives one. Orthonormal to 1e-5."""
  x = jax.random.normal(jax.random.key(0), (500, 6, 3))
  q = np.asarray(orthonormal(x))
  np.testing.assert_allclose(np.swapaxes(q, 1, 2) @ q, np.tile(np.eye(3), (500, 1, 1)), atol=1e-5)
  # The mean of every entry is 0 and of its square 1/6.
  assert np.abs(q.mean(0)).max() < 4 / (6 * 500) ** 0.5
  assert np.abs((q**2).mean(0) - 1 / 6).max() < 0.04
  for size in (12, 97, 4096 * 24):
    assert np.prod(square_sides(size)) == size


def test_a_cpu_factorises_one_matrix_at_a_time():
  """A batch goes to threads that it waits for on one of them: several at once never ended."""
  stack = jax.ShapeDtypeStruct((30, 6, 4), jnp.float32)
  lower = jax.jit(orthonormal).trace(stack).lower
  cpu, gpu = (lower(lowering_platforms=(name,)).as_text() for name in ('cpu', 'cuda'))
  operand = lambda text: re.search(r'custom_call @\w+geqrf.*: \(tensor<([\dx]+)xf32>', text)[1]
  assert operand(cpu) == '6x4'
  assert operand(gpu) == '30x6x4'


def test_a_config_reaches_the_square_view_of_long_factors():
  factor = {'blocks': {'b': jax.ShapeDtypeStruct((2, 2, 24), jnp.float32)}}
  make = optimizers.ZEROTH_ORDER['subzero']
  state = jax.eval_shape(make(0.1, rank=4, reshape=True).init, factor)
  assert state[0].basis['left']['blocks']['b'].shape == (2, 6, 4)  # Of 6 x 8.
  with pytest.raises(ValueError, match='side below rank 4'):
    jax.eval_shape(make(0.1, rank=4).init, factor)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: estimators.spsa(0.0), 'eps is 0.0'),
    (lambda: estimators.spsa(samples=0), 'samples is 0'),
    (lambda: estimators.spsa(sides=3), 'sides is 3'),
    (lambda: estimators.spsa(form='array'), "the nearest is 'arrays'"),
    (lambda: estimators.spsa(noise='sphere', blockwise=True), 'one radius for all'),
    (lambda: estimators.lozo(0), 'rank is 0'),
    (lambda: estimators.lozo(2, scale='papers'), "the nearest is 'paper'"),
    (lambda: estimators.lozo(2, momentum=1.0), 'momentum is 1.0'),
    (lambda: estimators.subzero(2, refresh_every=0), 'refresh_every is 0'),
    (
      lambda: estimators.lozo(5).init(draw(0, np.float32)),
      r'blocks/w: shape \(2, 4, 6\) has a side below',
    ),
    (
      lambda: estimators.spsa(targets=lambda path: False).init(draw(0, np.float32)),
      'chooses none of the 2',
    ),
    (lambda: memjax.mezo_adam(0.1, window=0), 'window is 0'),
    (lambda: _update(value_fn=lambda p: p['bias']), r'an array of shape \(3,\)'),
    (lambda: _update(value_fn=lambda p: (quadratic(p), 1)), 'value_fn returned a tuple'),
    (lambda: _update(value_fn=lambda p: None), 'value_fn returned a NoneType'),
    (lambda: _update(), 'call update'),
    (
      lambda: estimators.spsa().init({'ids': jnp.arange(3), 'w': jnp.ones(2)}),
      'ids: int32 cannot be perturbed',
    ),
    (
      lambda: estimators.spsa(blockwise=True).init(
        {'blocks': {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 3))}}
      ),
      'blocks/b: 3 layers, but leaves before it .* have 2',
    ),
  ],
)
def test_refusals(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def _update(**extra):
  transform, params = estimators.spsa(), draw(0, np.float32)
  return transform.update(None, transform.init(params), params, **extra)
