"""Moments that are not kept but computed anew, from the slopes of past steps and their noise.

Shapes in this file: `W` steps are remembered, `n` directions each; a leaf is `[..., m, n]`.
"""

import jax.numpy as jnp
import optax
from jax import lax

from memjax.estimators.estimator import Directions, estimator
from memjax.estimators.leaves import group_scales
from memjax.estimators.noise import Noise, family
from memjax.estimators.spsa import dense


def scale_by_recomputed_adam(
  eps: float = 1e-3,
  *,
  window: int = 256,
  b1: float = 0.9,
  b2: float = 0.999,
  adam_eps: float = 1e-8,
  samples: int = 1,
  sides: int = 2,
  noise: Noise | str = 'gaussian',
  targets=None,
  form: str = 'arrays',
  seed: int = 0,
  stack: str = 'blocks',
) -> optax.GradientTransformationExtraArgs:
  """Estimates as `spsa` does and hands on what Adam makes of it, without Adam's moments.

  Both moments are sums over past steps of a slope times noise that can be drawn again. State: `n +
  1` numbers a step remembered, in place of two a parameter. Time: draws the noise of the last
  `window` updates in every step, so this is for where memory is all that counts.

  Equal to Adam for the first `window` updates. Later ones leave out older terms, of weight `b **
  window`, and are corrected for that as Adam's are for its start.

  Args:
    eps: As in `spsa`.
    window: Updates remembered.
    b1: Decay of the first moment.
    b2: Decay of the second.
    adam_eps: Added to the root of the second moment.
    samples: As in `spsa`.
    sides: As in `spsa`.
    noise: As in `spsa`.
    targets: As in `spsa`.
    form: As in `spsa`.
    seed: As in `spsa`.
    stack: As in `spsa`.

  Raises:
    ValueError: for an argument out of range.

  References:
    Malladi et al., `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, 2023 (described in section 2.2, not in their code)
  """
  if window < 1:
    raise ValueError(f'window is {window}; moments remember at least one update')
  plain = dense(family(noise), seed)

  def remember(leaf, momentum, draw, slope, state):
    del draw, slope
    size = jnp.minimum(state.count - state.skipped, window)

    def add(age, sums):
      row = window - 1 - age
      first = state.numbers[row] * samples
      parts = [
        plain.estimate(leaf, first + i, group_scales(leaf, state.history[row, i]) / samples, {})
        for i in range(samples)
      ]
      found = sum(parts)
      mu, nu = sums
      # The weights of all terms add up to one, as after Adam's correction of its start.
      weigh = lambda b: (1 - b) * b**age / (1 - jnp.asarray(b, found.dtype) ** size)
      return mu + weigh(b1) * found, nu + weigh(b2) * found**2

    zero = jnp.zeros(leaf.shape, leaf.dtype)
    mu, nu = lax.fori_loop(0, size, add, (zero, zero))
    return mu / (jnp.sqrt(nu) + adam_eps), momentum

  directions: Directions = plain._replace(remember=remember)
  measure = 'two_sided' if sides == 2 else 'one_sided'
  return estimator(
    directions,
    eps,
    samples=samples,
    measure=measure,
    window=window,
    targets=targets,
    form=form,
    stack=stack,
  )
