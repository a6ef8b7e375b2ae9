"""Adafactor, AdaLomo, CAME and SM3: known trajectories, and stacks against their layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memjax
from memjax import compat, optimizers
from tests.transforms import golden

# From optax 0.2.8 and from the official packages run in NumPy: update -> the row of
# `golden.trajectory`.
ADAFACTOR = {
  1: (0.0831209, -0.0897229, 0.005021, 0.0496492, -0.011089),
  2: (0.0819040, -0.0888480, 0.003819, 0.0493340, -0.010110),
  10: (0.0786272, -0.0883254, 0.026517, 0.0505985, 0.003512),
  100: (0.0842380, -0.0931131, 0.020993, 0.0487681, -0.007254),
}
GOLDEN = {
  'adafactor': (lambda: memjax.adafactor(1e-2, min_dim_size_to_factor=1), ADAFACTOR),
  'adafactor_whole': (
    lambda: memjax.adafactor(1e-2),
    {
      1: (0.0834244, -0.0898352, 0.003087, None, None),
      100: (0.0859991, -0.0938085, 0.022473, None, None),
    },
  ),
  'adafactor_absolute': (
    lambda: memjax.adafactor(1e-2, min_dim_size_to_factor=1, multiply_by_parameter_scale=False),
    {
      1: (0.0699472, -0.0790035, -0.025812, 0.0400000, 0.008209),
      100: (0.0834365, -0.1254566, 0.209614, 0.0321329, 0.194048),
    },
  ),
  'adafactor_transformers': (
    lambda: compat.adafactor(1e-2, relative_step=False, beta1=0.9, weight_decay=0.1),
    {
      1: (0.0840384, -0.0904678, None, None, None),
      10: (0.0807766, -0.0885097, None, None, None),
      100: (0.0805187, -0.0894085, None, None, None),
    },
  ),
  'adalomo': (lambda: memjax.adalomo(1e-2), ADAFACTOR),
  'adalomo_decay': (
    lambda: memjax.adalomo(1e-2, weight_decay=0.1),
    {
      1: (0.0831149, -0.0897163, 0.005021, 0.0496475, -0.011089),
      10: (0.0785702, -0.0882617, 0.026500, None, None),
      100: (0.0836344, -0.0924461, 0.020843, 0.0485972, -0.007228),
    },
  ),
  'came': (
    lambda: memjax.came(1e-2),
    {
      1: (-0.0334852, 0.0669761, -0.193621, 0.0490000, -0.009791),
      2: (-0.2123143, 0.3007414, -0.319747, 0.0472184, -0.005080),
      10: (-2.0420170, 1.9269898, 3.896273, 0.0406815, 0.161127),
      100: (-1.8588923, 1.1944546, 6.334579, 0.0795751, 0.130315),
    },
  ),
  'came_decay': (
    lambda: memjax.came(1e-2, weight_decay=0.1),
    {
      1: (-0.0335694, 0.0670666, -0.193629, 0.0489500, -0.009779),
      10: (-2.0333552, 1.9172077, 3.889368, 0.0402604, 0.160745),
    },
  ),
  'sm3': (
    lambda: memjax.sm3(1e-2, 0.9, eps=1e-8),
    {
      1: (0.0831472, -0.0895578, 0.001460, None, None),
      10: (0.0645607, -0.0741284, -0.000446, None, None),
      100: (0.0597047, -0.0760862, 0.016508, None, None),
    },
  ),
}


def check(found, expected):
  """Compares the rows of a trajectory, where they are known, with printed digits."""
  for update, row in expected.items():
    for column, value in enumerate(row):
      if value is not None:
        # Values are printed to 7 digits and sums to 6; 100 updates in f32 add 1e-6 of the value.
        atol = 1e-6 if column in (2, 4) else 2e-7
        np.testing.assert_allclose(
          found[update - 1, column], value, rtol=2e-6, atol=atol, err_msg=f'{update=} {column=}'
        )


@pytest.mark.parametrize('name', GOLDEN)
def test_trajectories_are_the_published_ones(name):
  make, expected = GOLDEN[name]
  check(golden.trajectory(make(), max(expected)), expected)


# AdaLomo is Adafactor's two parts, with a decay between them.
STACKED = {
  'adafactor': lambda: memjax.adafactor(
    1e-2, min_dim_size_to_factor=2, momentum=0.5, weight_decay=0.1
  ),
  'came': lambda: memjax.came(1e-2, weight_decay=0.1),
  'sm3': lambda: memjax.sm3(1e-2),
  'adam_mini': lambda: memjax.adam_mini(1e-2, head_dim=5, weight_decay=0.1),
  'muon': lambda: memjax.muon(1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize('name', STACKED)
def test_a_stack_is_updated_as_its_layers_would_be(name):
  """Layers of very different scale, so that a norm over the stack would show."""
  optimizer = STACKED[name]()
  rng = np.random.default_rng(0)
  scales = np.asarray([1e-3, 1.0, 30.0, 2.0])
  draw = lambda *shape: rng.standard_normal(shape) * scales.reshape(4, *[1] * (len(shape) - 1))
  tree = lambda: jax.tree.map(
    jnp.float32,
    {'q': {'kernel': draw(4, 8, 10)}, 'norm': {'scale': draw(4, 10)}},
  )
  layers = lambda tree: [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(4)]
  params, gradients = tree(), [tree() for _ in range(2)]

  init = jax.jit(optimizer.init)
  update = jax.jit(optimizer.update)

  def run(params, gradients):
    first, second = gradients
    updates, state = update(first, init(params), params)
    updates, _ = update(second, state, optax.apply_updates(params, updates))
    return updates

  whole = run(params, gradients)
  singly = [run(p, g) for p, g in zip(layers(params), zip(*map(layers, gradients)))]
  for layer, expected in zip(layers(whole), singly):
    # Sums over one matrix in two programs: f32 rounding, and Muon's products over their scale.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), layer, expected
    )


def test_optax_spans_layers_where_we_do_not():
  """Why `optax.adafactor` is not enough: its clipping and scale are those of a whole stack."""
  params = {'w': jnp.stack([jnp.full((4, 4), 1e-3), jnp.ones((4, 4))])}
  gradient = {'w': jnp.ones((2, 4, 4))}
  first = lambda optimizer: jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0]
  np.testing.assert_allclose(first(memjax.adafactor(1.0))['w'][:, 0, 0], [-1e-3, -1.0], rtol=1e-6)
  theirs = first(optax.adafactor(1.0))
  np.testing.assert_allclose(theirs['w'][0], theirs['w'][1])


def test_adafactor_decays_by_the_learning_rate_and_a_schedule_acts_at_once():
  schedule = lambda count: jnp.where(count < 2, 0.1, 0.0)
  optimizer = memjax.adafactor(schedule, momentum=0.9, weight_decay=0.5)
  params = {'w': jnp.ones((4, 4))}
  state = optimizer.init(params)
  zero = {'w': jnp.zeros((4, 4))}
  update = jax.jit(optimizer.update)
  updates, state = update(zero, state, params)
  np.testing.assert_allclose(updates['w'], -0.05, rtol=1e-6)
  updates, state = update(params, state, params)
  assert jnp.all(updates['w'] < -0.05)
  updates, state = update(params, state, params)
  np.testing.assert_array_equal(updates['w'], 0)  # Also of the momentum.


def test_without_a_learning_rate_adafactor_takes_the_papers():
  given = memjax.adafactor(lambda count: jnp.minimum(0.01, (count + 1.0) ** -0.5))
  config = optimizers.OPTIMIZERS['adafactor'](1.0, relative_step=True, min_dim_size_to_factor=128)
  for optimizer in (memjax.adafactor(), config):
    np.testing.assert_allclose(
      golden.trajectory(optimizer, 3), golden.trajectory(given, 3), rtol=1e-6
    )


def test_a_decay_offset_after_a_fresh_start_gives_no_nan():
  """`optax.adafactor` raises a negative number to a fractional power here."""
  transform = memjax.scale_by_adafactor(decay_offset=5)
  gradient = golden.gradient(1)
  plain = memjax.scale_by_adafactor()
  updates, expected = jax.jit(lambda g: [t.update(g, t.init(g))[0] for t in (transform, plain)])(
    gradient
  )
  jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_came_starts_ten_times_too_large_on_matrices_only():
  transform = memjax.scale_by_came()
  gradient = golden.gradient(1)
  updates, _ = jax.jit(transform.update)(gradient, transform.init(gradient))
  rms = jax.tree.map(lambda u: float(jnp.sqrt(jnp.mean(u * u))), updates)
  assert 10 < rms['w'] < 12
  assert rms['b'] == pytest.approx(0.1, rel=0.05)


def test_sm3_bounds_the_sum_of_squares_and_starts_as_sign_descent():
  transform = memjax.scale_by_sm3()
  gradients = [golden.gradient(t) for t in range(1, 9)]
  state, first = transform.init(gradients[0]), None
  update = jax.jit(transform.update)
  for gradient in gradients:
    updates, state = update(gradient, state)
    first = updates if first is None else first
  sums = sum(np.square(g['w']) for g in gradients)
  bound = np.minimum(state.factors.v_row['w'], state.factors.v_col['w'])
  assert np.all(bound >= sums * (1 - 1e-6))
  assert np.all(bound <= sums.sum())
  np.testing.assert_allclose(first['w'], np.sign(gradients[0]['w']), rtol=1e-5)
  np.testing.assert_allclose(state.factors.v['b'], sum(np.square(g['b']) for g in gradients), 1e-5)


def test_a_relative_step_without_weights_names_the_remedy():
  optimizer, params = memjax.adafactor(), golden.params()
  with pytest.raises(ValueError, match=r'update\(updates, state, params\)'):
    optimizer.update(params, optimizer.init(params))


@pytest.mark.parametrize('name', ['adafactor', 'adalomo', 'came', 'sm3', 'galore_adafactor'])
def test_factories_of_a_config_step_down_and_spare_norms_their_decay(name):
  arguments = {'weight_decay': 0.1, **({'rank': 2} if 'galore' in name else {})}
  optimizer = optimizers.OPTIMIZERS[name](1.0, **arguments)
  params = {'layer': {'kernel': jnp.ones((2, 4, 6)), 'norm': {'scale': jnp.ones((2, 6))}}}
  update = jax.jit(lambda gradient: optimizer.update(gradient, optimizer.init(params), params)[0])
  still = update(jax.tree.map(jnp.zeros_like, params))
  np.testing.assert_allclose(still['layer']['kernel'], -0.1, rtol=1e-6)
  np.testing.assert_array_equal(still['layer']['norm']['scale'], 0)
  assert all(jnp.all(u < 0) for u in jax.tree.leaves(update(params)))
