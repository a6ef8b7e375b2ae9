"""SPSA with dense noise: MeZO's estimator, its relatives, and forward gradients.

Shapes in this file: `d` parameters, `L` layers, `n` directions a step.
"""

import math

import jax
import jax.numpy as jnp
import optax

from memjax import weights
from memjax.estimators.estimator import Directions, estimator
from memjax.estimators.noise import Noise, family


def spsa(
  eps: float = 1e-3,
  *,
  samples: int = 1,
  sides: int = 2,
  noise: Noise | str = 'gaussian',
  blockwise: bool = False,
  targets=None,
  form: str = 'arrays',
  seed: int = 0,
  stack: str = 'blocks',
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates a gradient from values at `params + eps z` and `params - eps z`.

  Hands on :math:`\frac1n \sum_i g_i z_i` with :math:`g_i = (f(\theta + \epsilon z_i) - f(\theta -
  \epsilon z_i)) / 2 \epsilon`, whose mean is the gradient up to :math:`\epsilon^2`, and whose
  squared norm is `(d + n - 1) / n` times the gradient's for Gaussian noise: learning rates are
  smaller than with a gradient by about that factor.

  State: `n + 8` numbers. In a memjax step (`form='weights'`, `memjax.steps.zeroth_order`) no
  perturbed weight and no estimate is ever held whole; on its own the transform hands on arrays like
  any other. Sends nothing: what devices must agree on is the value.

  Example:
    >>> import jax, jax.numpy as jnp, optax, memjax
    >>> loss = lambda params: jnp.sum((params['w'] - 3.0) ** 2)
    >>> optimizer = optax.chain(memjax.spsa(), optax.sgd(0.05))
    >>> params = {'w': jnp.zeros(4)}
    >>> state = optimizer.init(params)
    >>> @jax.jit
    ... def step(params, state):
    ...   updates, state = optimizer.update(None, state, params, value_fn=loss)
    ...   return optax.apply_updates(params, updates), state
    >>> for _ in range(100):
    ...   params, state = step(params, state)
    >>> bool(loss(params) < 0.01)
    True

    The function is traced, and need not be differentiable. One that is Python or NumPy, such as a
    metric of generated text, goes through a callback, which the program waits for:

    >>> import numpy as np
    >>> count = lambda w: np.float32(np.sum(np.asarray(w) < 3.0))
    >>> metric = lambda params: jax.pure_callback(count, jnp.float32(0), params['w'])
    >>> search, params = memjax.spsa(5.0), {'w': jnp.zeros(4)}
    >>> _, state = search.update(None, search.init(params), params, value_fn=metric)
    >>> bool(jnp.isfinite(state.slopes[0, 0]))
    True

  Args:
    eps: Distance of the values from the parameters, in standard deviations of the noise.
    samples: Directions `n` a step, all from the same parameters.
    sides: 2, or 1 to compare with the value at the parameters: `n + 1` values in place of `2 n`,
      and an error of order `eps`.
    noise: `'gaussian'`, `'rademacher'` (signs, the cheapest to draw), `'sphere'`, or a
      `memjax.estimators.noise.Noise`, such as a `sparse` one.
    blockwise: Perturbs one layer, or other first key, at a time; see `memjax.estimators.estimator`.
    targets: Function of a leaf's path that says whether it is trained; None trains all.
    form: `'arrays'` hands arrays to `value_fn`; `'weights'` hands `memjax.weights` leaves.
    seed: Of the noise.
    stack: First key of the leaves that are stacked over layers.

  Returns:
    A transform to put first in a chain; `update(_, state, params, value_fn=...)` ignores gradients.

  Raises:
    ValueError: for an argument out of range, also `noise='sphere'` with `blockwise`.

  References:
    Malladi et al., `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, 2023
  """
  if sides not in (1, 2):
    raise ValueError(f'sides is {sides}; values are taken on 1 or on 2 sides of the parameters')
  noise = family(noise)
  if noise.on_sphere and blockwise:
    raise ValueError("noise='sphere' has one radius for all parameters; with blockwise use another")
  return estimator(
    dense(noise, seed),
    eps,
    samples=samples,
    measure='two_sided' if sides == 2 else 'one_sided',
    blockwise=blockwise,
    targets=targets,
    form=form,
    stack=stack,
  )


def forward_gradient(
  *,
  samples: int = 1,
  noise: Noise | str = 'gaussian',
  targets=None,
  form: str = 'arrays',
  seed: int = 0,
  stack: str = 'blocks',
) -> optax.GradientTransformationExtraArgs:
  """Estimates a gradient from its exact product with a random direction, in forward mode.

  As `spsa` with `eps` going to 0: one pass, which carries the derivative of the activations along
  and so takes about twice the time and the activations of a forward pass, but no backward pass. The
  derivative is the one by the scale of the noise: no tangent of the parameters is held.

  Args:
    samples: Directions a step.
    noise: As in `spsa`.
    targets: As in `spsa`.
    form: As in `spsa`.
    seed: Of the noise.
    stack: As in `spsa`.

  References:
    Baydin et al., `Gradients without Backpropagation <https://arxiv.org/abs/2202.08587>`_, 2022
  """
  return estimator(
    dense(family(noise), seed),
    0.0,
    samples=samples,
    measure='forward',
    targets=targets,
    form=form,
    stack=stack,
  )


def dense(noise: Noise, seed: int) -> Directions:
  """Returns directions of independent numbers."""
  root = jax.random.key(seed)

  def perturb(leaf, value, draw, scale, basis):
    del basis
    return weights.Perturbed(value, leaf.key(noise, root, draw), scale, noise)

  def estimate(leaf, draw, slope, basis):
    del basis
    z = noise.draw(leaf.key(noise, root, draw), leaf.shape)
    return times(slope, z)

  def factor(leaves, draw):
    """sqrt(d) / |z|: one more draw of everything."""
    trained = [leaf for leaf in leaves if leaf.trained]
    square = sum(squared_norm(noise, leaf, leaf.key(noise, root, draw)) for leaf in trained)
    return jnp.sqrt(sum(math.prod(leaf.shape) for leaf in trained) / square)

  return Directions(
    init=lambda leaves: ({}, [None] * len(leaves)),
    refresh=lambda leaves, basis, number: basis,
    perturb=perturb,
    estimate=estimate,
    factor=factor if noise.on_sphere else None,
  )


def times(slope: jax.Array, z: jax.Array) -> jax.Array:
  """Returns `slope * z` in the slope's dtype; a slope a layer, `[l]`, meets `[l, ...]`."""
  return slope.reshape(slope.shape + (1,) * (z.ndim - slope.ndim)) * z.astype(slope.dtype)


def squared_norm(noise: Noise, leaf, key: jax.Array) -> jax.Array:
  """Returns the squared norm of a leaf's noise, in the dtype of its estimate; draws one layer at
  a time.
  """
  square = lambda key, shape: jnp.sum(noise.draw(key, shape).astype(leaf.dtype) ** 2)
  if leaf.layers is None:
    return square(key, leaf.shape)
  return jnp.sum(jax.lax.map(lambda key: square(key, leaf.shape[1:]), key))
