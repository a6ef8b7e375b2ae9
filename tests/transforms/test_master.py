"""f32 copies of 16-bit parameters, against an optimizer that runs on f32 parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memjax.transforms import keep_master

SHAPES = {'half': (5, 4), 'single': (3,)}


def draw(seed):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def halve(tree):
  return {**tree, 'half': jnp.asarray(tree['half'], jnp.bfloat16)}


def run(transform, params, grads):
  state = transform.init(params)
  for grad in grads:
    updates, state = transform.update(grad, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def test_parameters_are_the_rounded_copies_of_f32_training():
  # Of one sign, so that updates add up.
  grads = [halve(jax.tree.map(np.abs, draw(seed))) for seed in range(1, 21)]
  params = jax.tree.map(jnp.asarray, halve(draw(0)))
  adamw = optax.adamw(2e-4, weight_decay=0.1)  # An update is a twentieth of the last place of 0.5.
  got, state = run(keep_master(adamw), params, grads)
  wide = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  expected, _ = run(adamw, wide(params), [wide(g) for g in grads])
  assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, params)
  np.testing.assert_array_equal(state.master['half'], expected['half'])
  np.testing.assert_array_equal(got['half'], expected['half'].astype(jnp.bfloat16))
  np.testing.assert_array_equal(got['single'], expected['single'])
  # Without the copies nothing would have moved.
  lost, _ = run(adamw, params, grads)
  large = np.abs(np.asarray(params['half'], np.float32)) > 0.5
  np.testing.assert_array_equal(lost['half'][large], params['half'][large])
  assert np.mean(got['half'][large] != params['half'][large]) > 0.5


def test_only_16_bit_parameters_have_copies():
  state = keep_master(optax.sgd(0.1)).init(jax.tree.map(jnp.asarray, halve(draw(0))))
  assert [x.shape for x in jax.tree.leaves(state.master)] == [SHAPES['half']]
