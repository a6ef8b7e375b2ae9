"""bf16 state: what rounding to nearest loses, stochastic rounding keeps in the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from memjax import optimizers, sharding, transforms
from memjax.transforms.layers import Layer


def decay(optimizer, state, updates):
  """The second moment under gradients of zero."""
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), optax.tree.get(state, 'nu'))
  one = lambda state, _: (optimizer.update(zeros, state)[1], None)
  state, _ = jax.jit(lambda s: jax.lax.scan(one, s, length=updates))(state)
  return np.asarray(optax.tree.get(state, 'nu')['w'], np.float64)


def test_second_moment_decays_in_the_mean_where_nearest_sticks():
  params = {'w': jnp.zeros((8, 512))}
  optimizer = transforms.round_state(optax.scale_by_adam(b2=0.999))
  state = optimizer.init(params)
  ones = {'w': jnp.full((8, 512), 1.2, jnp.bfloat16)}
  start = float(ones['w'][0, 0])
  state = state._replace(inner=state.inner._replace(nu=ones))
  found = decay(optimizer, state, 200)
  # Each number is a martingale around 0.999**k; a step of 2**-8 (1 / 2 <= v < 1) or 2**-7 has
  # variance at most step**2 / 4 an update, and the mean is over 4,096 numbers.
  error = np.sqrt(200 * (2.0**-7) ** 2 / 4 / found.size)
  assert abs(found.mean() - start * 0.999**200) < 4 * error < 0.01
  assert found.std() > 0

  nearest = optax.scale_by_adam(b2=0.999)
  stuck = nearest.init(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))._replace(nu=ones)
  bf16 = {'w': jnp.zeros((8, 512), jnp.bfloat16)}
  for _ in range(3):
    _, stuck = nearest.update(bf16, stuck)
  np.testing.assert_array_equal(stuck.nu['w'], ones['w'])


def test_state_is_bf16_and_updates_are_close_to_adams():
  params = {'w': jnp.zeros((3, 64, 64)), 'b': jnp.zeros(64, jnp.bfloat16)}
  optimizer = transforms.round_state(optax.scale_by_adam())
  state, reference = optimizer.init(params), optax.scale_by_adam().init(params)
  assert {x.dtype for x in jax.tree.leaves((state.inner.mu, state.inner.nu))} == {
    jnp.dtype(jnp.bfloat16)
  }
  numbers = 3 * 64 * 64 + 64
  assert sum(x.nbytes for x in jax.tree.leaves(state)) == 4 * numbers + 8
  update = jax.jit(optimizer.update)
  for step in range(4):
    gradient = {'w': jax.random.normal(jax.random.key(step), (3, 64, 64)), 'b': params['b'] + 1}
    updates, state = update(gradient, state)
    expected, reference = optax.scale_by_adam().update(gradient, reference)
    if step == 0:
      # The first update is computed before anything is rounded.
      np.testing.assert_allclose(updates['w'], expected['w'], rtol=2e-5)
  assert updates['b'].dtype == jnp.bfloat16
  np.testing.assert_allclose(updates['w'], expected['w'], atol=0.03)
  assert np.any(np.asarray(state.inner.mu['w'][0]) != np.asarray(state.inner.mu['w'][1]))


def test_no_mesh_changes_the_bits():
  params = {'w': jnp.zeros((4, 64, 64))}
  optimizer = transforms.round_state(optax.scale_by_adam(), seed=3)
  state = optimizer.init(params)
  where = sharding.param_shardings(
    params, [('', PartitionSpec(None, 'fsdp', 'tensor'))], sharding.make_mesh(1, 4, 2)
  )
  other = jax.device_put(state, sharding.state_shardings(state, params, where))
  update = jax.jit(optimizer.update)
  for step in range(2):
    gradient = {'w': jax.random.normal(jax.random.key(step), (4, 64, 64))}
    _, state = update(gradient, state)
    _, other = update(jax.device_put(gradient, where), other)
  jax.tree.map(np.testing.assert_array_equal, other, state)


def test_a_layer_alone_is_rounded_as_in_the_stack():
  params = {'blocks': {'w': jnp.zeros((3, 16, 16))}, 'head': jnp.zeros((4, 16))}
  optimizer = transforms.round_state(optax.scale_by_adam())
  gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
  gradient['blocks']['w'] = jnp.broadcast_to(gradient['blocks']['w'][:1], (3, 16, 16))
  state = optimizer.init(params)
  _, whole = jax.jit(optimizer.update)(gradient, state)

  def one(tree, index):
    take = lambda path, x: x[index : index + 1] if 'blocks' in str(path) else x
    return jax.tree_util.tree_map_with_path(take, tree)

  update = jax.jit(lambda g, s, index: optimizer.update(g, s, layer=Layer(index, 3, 'blocks')))
  for index in range(3):
    _, alone = update(one(gradient, index), one(state, index), jnp.int32(index))
    jax.tree.map(np.testing.assert_array_equal, alone, one(whole, index))
  # The layers' gradients are equal, their noise is not.
  assert np.any(np.asarray(whole.inner.mu['blocks']['w'][0] != whole.inner.mu['blocks']['w'][1]))


def test_a_config_can_ask_for_rounded_moments():
  params = {'w': jnp.zeros((4, 6))}
  state = jax.eval_shape(optimizers.OPTIMIZERS['adamw'](1e-3, state_dtype='bfloat16').init, params)
  assert state[0].inner.mu['w'].dtype == state[0].inner.nu['w'].dtype == jnp.bfloat16
  with pytest.raises(ValueError, match='state_dtype must be'):
    optimizers.OPTIMIZERS['adamw'](1e-3, state_dtype='float16')
