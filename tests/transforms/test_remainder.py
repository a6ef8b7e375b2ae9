"""What rounding takes from 16-bit parameters, against training of f32 parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memjax.transforms import keep_remainder
from tests.transforms.test_master import draw, halve, run


def test_updates_below_the_last_place_add_up():
  grads = [halve(jax.tree.map(np.abs, draw(seed))) for seed in range(1, 41)]
  params = jax.tree.map(jnp.asarray, halve(draw(0)))
  sgd = optax.sgd(2e-5)  # Of order a hundredth of the last place of 0.5.
  got, state = run(keep_remainder(sgd), params, grads)
  wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  expected, _ = run(sgd, wide(params), [wide(g) for g in grads])
  assert got['half'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(got['single'], expected['single'])
  total = got['half'].astype(jnp.float32) + state.remainder['half'].astype(jnp.float32)
  # 40 remainders, each rounded to 8 bits of half a last place, 2**-9 of the parameter.
  tolerance = 40 * 2**-18 * np.abs(expected['half'])
  np.testing.assert_array_less(np.abs(total - expected['half']), tolerance)
  moved = np.abs(expected['half'] - params['half'].astype(np.float32))
  assert moved.max() > 20 * tolerance.min()
  # The parameter is the sum, rounded; without the remainder the large ones had not moved.
  np.testing.assert_array_equal(got['half'], total.astype(jnp.bfloat16))
  lost, _ = run(sgd, params, grads)
  large = np.abs(np.asarray(params['half'], np.float32)) > 0.5
  np.testing.assert_array_equal(lost['half'][large], params['half'][large])


def test_the_mean_of_many_updates_survives():
  params = {'w': jnp.ones((4096,), jnp.bfloat16)}
  grads = [{'w': jnp.full((4096,), 1e-4)}] * 50
  got, _ = run(keep_remainder(optax.sgd(1.0)), params, grads)
  # 0.005 below 1, where the last place below 1 is 2**-8 = 0.0039: one of them, as rounding says.
  assert float(got['w'][0]) == 1 - 2**-8


def test_only_16_bit_parameters_have_remainders():
  state = keep_remainder(optax.sgd(0.1)).init(jax.tree.map(jnp.asarray, halve(draw(0))))
  assert [(x.shape, x.dtype) for x in jax.tree.leaves(state.remainder)] == [((5, 4), jnp.bfloat16)]
