"""SM3: Adagrad whose second moment is the smaller of a row's and a column's.

Shapes in this file: a matrix leaf is `[..., m, n]`; leading axes are batch (scan-stacked layers,
experts), and every matrix has its own row and column.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms import explicit, units
from memjax.transforms import factors as factors_lib
from memjax.transforms.factors import Factors
from memjax.transforms.float32 import in_float32


class Sm3State(NamedTuple):
  """State of `scale_by_sm3`."""

  factors: Factors  # Bounds on the summed squares of the gradient: largest of a row, of a column.
  mu: optax.Updates  # The leaf's shape, f32: average of the updates; () without momentum.


def scale_by_sm3(
  b1: float = 0.0, b2: float = 1.0, *, eps: float = 1e-30
) -> optax.GradientTransformation:
  r"""Rescales updates by SM3-II.

  .. math::
    V = \min(R, C^T) + G^2, \quad U = G / \sqrt{V + \epsilon}, \quad
    R \leftarrow \max_n V, \quad C \leftarrow \max_m V

  with :math:`U = 0` where `V` is 0. `optax.sm3` has one accumulator an axis, so that layers of a
  stack share theirs with other layers, and always keeps momentum; here each matrix of a stack is on
  its own. Leaves that are no matrices get Adagrad.

  A matrix keeps `m + n` f32 numbers, `m n` more with momentum. Sharded over m or n, an update
  communicates the largest of rows or columns, never a matrix.

  Example:
    >>> state = scale_by_sm3().init({'w': jnp.zeros([8, 4, 6])})
    >>> jax.tree.map(jnp.shape, state.factors.v_row), state.mu
    ({'w': (8, 4, 1)}, ())

  Args:
    b1: Decay rate of the momentum; 0 keeps none.
    b2: Decay rate of the sum of squares; 1 sums for ever, as published. Less averages, the new
      square with weight `1 - b2`.
    eps: Added to the sum of squares.

  Returns:
    A transform with state `Sm3State`; it does not read `params`.

  References:
    Anil et al., `Memory-Efficient Adaptive Optimization
    <https://arxiv.org/abs/1901.11150>`_, 2019
  """
  with_momentum = isinstance(b1, jax.Array) or b1 > 0

  def init(params):
    factors = factors_lib.init_factors(params, units.is_matrix)
    return Sm3State(factors, jax.tree.map(units.zeros, params) if with_momentum else ())

  def update(updates, state, params=None):
    del params
    return explicit.on_auto_axes(step, (updates, state), updates, state)

  def step(updates, state):
    # A constant 1 for b2 == 1, where the weights of an average would be 0 and 1.
    weight = 1.0 if not isinstance(b2, jax.Array) and b2 == 1 else 1 - b2
    squares = jax.tree.map(lambda g: weight * factors_lib.square(g), updates)
    bounds = factors_lib.combine(jnp.minimum, updates, state.factors)
    sums = jax.tree.map(lambda v, square: b2 * v + square, bounds, squares)
    factors = factors_lib.reduce(jnp.max, sums, state.factors)
    scaled = jax.tree.map(
      lambda g, v: jnp.where(v > 0, factors_lib.widen(g) * jax.lax.rsqrt(v + eps), 0), updates, sums
    )
    mu = ()
    if with_momentum:
      mu = scaled = jax.tree.map(lambda m, u: b1 * m + (1 - b1) * u, state.mu, scaled)
    scaled = jax.tree.map(lambda u, g: u.astype(g.dtype), scaled, updates)
    return scaled, Sm3State(factors, mu)

  return optax.GradientTransformation(init, update)


def sm3(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.0,
  b2: float = 1.0,
  *,
  eps: float = 1e-30,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """SM3 with decoupled weight decay: `scale_by_sm3`, decay, learning rate.

  Example:
    >>> optimizer = sm3(learning_rate=0.01)
    >>> loss = lambda params: jnp.mean(jnp.square(params['w']))
    >>> params = {'w': jnp.ones([16, 24])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(f'{loss(params):.3f}')
    0.980
    0.966
    0.955

  Args:
    learning_rate: A number or an optax schedule.
    b1: As `scale_by_sm3`.
    b2: As `scale_by_sm3`.
    eps: As `scale_by_sm3`.
    weight_decay: Decoupled decay, times the learning rate.
    mask: Leaves to decay, as in `optax.adamw`.

  Returns:
    A transform that yields updates to be added to the parameters.
  """
  steps = optax.chain(
    scale_by_sm3(b1, b2, eps=eps),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  return in_float32(steps)
