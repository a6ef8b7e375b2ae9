"""CAME: factored Adafactor with momentum, slowed where updates disagree with it.

Shapes in this file: a matrix leaf is `[..., m, n]`; leading axes are batch (scan-stacked layers,
experts), and every matrix has its own factors and its own clipping.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms import explicit, units
from memjax.transforms import factors as factors_lib
from memjax.transforms.factors import Factors
from memjax.transforms.float32 import in_float32


class CameState(NamedTuple):
  """State of `scale_by_came`."""

  mu: optax.Updates  # The leaf's shape, f32: average of the clipped updates.
  factors: Factors  # Of the squared gradient.
  instability: Factors  # Of the squared distance between update and `mu`; of matrices only.


def scale_by_came(
  b1: float = 0.9,
  b2: float = 0.999,
  b3: float = 0.9999,
  *,
  eps: float = 1e-30,
  instability_eps: float = 1e-16,
  clipping_threshold: float | None = 1.0,
  min_dim_size_to_factor: int = 1,
) -> optax.GradientTransformation:
  r"""Rescales updates by factored confidence.

  `U` is Adafactor's clipped update with the constant decay `b2`; then

  .. math::
    M &\leftarrow b_1 M + (1 - b_1) U, \quad \Delta = (U - M)^2 + \epsilon_2 \\
    R &\leftarrow b_3 R + (1 - b_3) \, \mathrm{mean}_n(\Delta), \quad
    C \leftarrow b_3 C + (1 - b_3) \, \mathrm{mean}_m(\Delta)

  and the update is :math:`M \, (R \, C^T / \mathrm{mean}(R))^{-1/2}`. Leaves that are not factored
  take `M` itself.

  No average is corrected for its start at zero, as published: with the default `b3` the first
  updates of a matrix have an RMS of 10 to 20, not 1, and the surplus fades like `1 / sqrt(1 -
  b3**t)`. Warm the learning rate up.

  A matrix keeps `m n + 2 (m + n)` f32 numbers, any other leaf two a number. Sharded over m or n,
  an update communicates sums of rows or columns, never a matrix.

  Example:
    >>> state = scale_by_came().init({'w': jnp.zeros([8, 4, 6])})
    >>> state.mu['w'].shape, state.instability.v_row['w'].shape
    ((8, 4, 6), (8, 4, 1))

  Args:
    b1: Decay rate of the momentum.
    b2: Decay rate of the second moment.
    b3: Decay rate of the instability; the authors recommend 0.9995 to 0.99995 with these `b1` and
      `b2`, and 0.99 to 0.999 with 0.9 and 0.95.
    eps: Added to the squared gradient.
    instability_eps: Added to the squared distance.
    clipping_threshold: Largest RMS of a unit's update before the momentum; None does not clip.
    min_dim_size_to_factor: A matrix with a shorter side is not factored; 1 factors all.

  Returns:
    A transform with state `CameState`; it does not read `params`.

  References:
    Luo et al., `CAME: Confidence-guided Adaptive Memory Efficient Optimization
    <https://arxiv.org/abs/2307.02047>`_, 2023
  """
  factored = functools.partial(factors_lib.is_factored, min_dim_size_to_factor)

  def init(params):
    factors = factors_lib.init_factors(params, factored)
    mu = jax.tree.map(units.zeros, params)
    return CameState(mu, factors, _only_matrices(factors))

  def update(updates, state, params=None):
    del params
    return explicit.on_auto_axes(step, (updates, state), updates, state)

  def step(updates, state):
    wide = jax.tree.map(factors_lib.widen, updates)
    factors = factors_lib.average(wide, state.factors, b2, eps)
    scaled = factors_lib.rescale(wide, factors, clipping_threshold)

    mu = jax.tree.map(lambda m, u: b1 * m + (1 - b1) * u, state.mu, scaled)
    distance = jax.tree.map(jnp.subtract, scaled, mu)
    instability = factors_lib.average(distance, state.instability, b3, instability_eps)
    confident = factors_lib.rescale(mu, instability)
    confident = jax.tree.map(lambda u, g: u.astype(g.dtype), confident, updates)
    return confident, CameState(mu, factors, instability)

  return optax.GradientTransformation(init, update)


def came(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  b3: float = 0.9999,
  *,
  eps: float = 1e-30,
  instability_eps: float = 1e-16,
  clipping_threshold: float | None = 1.0,
  min_dim_size_to_factor: int = 1,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """CAME with decoupled weight decay: `scale_by_came`, decay, learning rate.

  Example:
    >>> optimizer = came(learning_rate=1e-3)
    >>> loss = lambda params: jnp.mean(jnp.square(params['w']))
    >>> params = {'w': jnp.ones([16, 24])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(f'{loss(params):.3f}')
    0.978
    0.947
    0.910

  Args:
    learning_rate: A number or an optax schedule, which should warm up; published, 0.5 to 0.9 of
      AdamW's.
    b1: As `scale_by_came`.
    b2: As `scale_by_came`.
    b3: As `scale_by_came`.
    eps: As `scale_by_came`.
    instability_eps: As `scale_by_came`.
    clipping_threshold: As `scale_by_came`.
    min_dim_size_to_factor: As `scale_by_came`.
    weight_decay: Decoupled decay, times the learning rate.
    mask: Leaves to decay, as in `optax.adamw`.

  Returns:
    A transform that yields updates to be added to the parameters.
  """
  steps = optax.chain(
    scale_by_came(
      b1,
      b2,
      b3,
      eps=eps,
      instability_eps=instability_eps,
      clipping_threshold=clipping_threshold,
      min_dim_size_to_factor=min_dim_size_to_factor,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  return in_float32(steps)


def _only_matrices(factors: Factors) -> Factors:
  masked = jax.tree.map(lambda _: optax.MaskedNode(), factors.v)
  return factors._replace(v=masked)
