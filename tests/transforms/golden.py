"""A small problem whose trajectories are known: a matrix and a bias under drifting gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

_I, _J = np.indices((4, 6))
_K = np.arange(6)


def params():
  """A matrix `[4, 6]` and a vector `[6]`, f32."""
  return {
    'w': jnp.asarray(0.1 * np.sin(1 + 6 * _I + _J), jnp.float32),
    'b': jnp.asarray(0.05 * np.cos(_K), jnp.float32),
  }


def gradient(t):
  """Their gradients at update `t = 1, 2, ...`."""
  return {
    'w': jnp.asarray(0.01 * (_I + 1) * np.sin(0.7 * (_I + 1) * (_J + 1) + 0.3 * t), jnp.float32),
    'b': jnp.asarray(0.02 * np.cos(0.5 * (_K + 1) + 0.2 * t), jnp.float32),
  }


def trajectory(optimizer, until, transpose=False, name='w'):
  """`w[0, 0]`, `w[3, 5]`, the sums of both, and `b[0]` after each update, f64 `[until, 5]`.

  Args:
    optimizer: Of the tree above.
    until: Updates.
    transpose: Gives the optimizer `w.T`, as a Flax kernel is a PyTorch weight.
    name: Of the matrix.
  """

  def given(tree):
    return {name: tree['w'].T if transpose else tree['w'], 'b': tree['b']}

  held = given(params())
  state = optimizer.init(held)

  @jax.jit
  def step(held, state, gradient):
    updates, state = optimizer.update(gradient, state, held)
    return optax.apply_updates(held, updates), state

  rows = []
  for t in range(1, until + 1):
    held, state = step(held, state, given(gradient(t)))
    w, b = np.float64(held[name]), np.float64(held['b'])
    w = w.T if transpose else w
    rows.append([w[0, 0], w[3, 5], w.sum(), b[0], b.sum()])
  return np.asarray(rows)
