"""What a step that takes values instead of gradients says about itself.

Shapes in this file: `n` directions, `G` groups, see `memjax.estimators.estimator`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memjax.estimators.estimator import FORGET, EstimatorState, is_state
from memjax.estimators.log import Log, first_row


def slope_metrics(found: EstimatorState) -> dict[str, jax.Array]:
  """Returns metrics of the estimate that a state holds, every one finite.

  `zo/slope`: root mean square of the slopes.
  `zo/slope_variance`: over the slopes of the step, or over recent steps if there is only one.
  `zo/signal_to_noise`: their mean over the root of that variance. The mean over `n` directions is
    some `1 / sqrt(n)` of their spread where slopes are symmetric around zero, as two-sided ones
    are; more says that they lean to one side, as one-sided ones do where the loss is curved.
  `zo/difference_ulps`: root mean square difference of the two values of a pair, over the unit in
    the last place of the loss: below some 10 a slope is made of rounding, and `eps` too small. 0 in
    forward mode, which takes no difference.
  `zo/skipped`: estimates that were skipped, so far; `zo/skipped_in_a_row`: since the last that was
    not.
  """
  slopes = found.slopes
  if slopes.size > 1:
    mean, variance = jnp.mean(slopes), jnp.var(slopes, ddof=1)
  else:
    finished = found.count - found.skipped
    mean, square = found.moments / (1 - FORGET ** jnp.maximum(finished, 1).astype(slopes.dtype))
    # After a single step there is no spread but rounding.
    variance = jnp.where(finished > 1, jnp.maximum(square - mean**2, 0), 0)
  # A loss of zero has no unit of its own; the values on both sides of it have.
  unit = jnp.finfo(slopes.dtype).eps * (jnp.abs(found.value) + found.difference)
  return {
    'zo/slope': jnp.sqrt(jnp.mean(slopes**2)),
    'zo/slope_variance': variance,
    'zo/signal_to_noise': _ratio(jnp.abs(mean), jnp.sqrt(variance)),
    'zo/difference_ulps': _ratio(found.difference, unit),
    'zo/skipped': found.skipped,
    'zo/skipped_in_a_row': found.count - 1 - found.last,
  }


def loss(found: EstimatorState) -> jax.Array:
  """Returns the mean of the values of the last estimate, NaN if it was skipped."""
  return jnp.where(found.skips(), jnp.nan, found.value)


def first_rows(params: Any) -> list[jax.Array]:
  """Returns the first row of each leaf, few numbers that stand for all."""
  leaves = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  return [first_row(leaf) for leaf in leaves]


def after(read: Any, opt: Any) -> tuple[Any, Any]:
  """Makes the update wait for what was read of the parameters, by itself or by the log: else they
  are all copied, to be read later.
  """
  opt, treedef = jax.tree.flatten(opt, is_leaf=lambda x: is_state(x) or isinstance(x, Log))
  at = next(i for i, leaf in enumerate(opt) if is_state(leaf))
  logs = {i: leaf for i, leaf in enumerate(opt) if isinstance(leaf, Log)}
  values = lax.optimization_barrier((read, logs, opt[at].count))
  same = lambda values: values
  read, logs, count = lax.platform_dependent(values, cpu=_through_a_loop, default=same)
  opt[at] = opt[at]._replace(count=count)
  return read, treedef.unflatten([logs.get(i, leaf) for i, leaf in enumerate(opt)])


def _through_a_loop(values):
  """Returns numbers as they are, the last a count from 0, out of a loop: JAX 0.10's compiler for
  CPUs forgets barriers, and reads where the result is used.
  """
  negative = lambda _, values: jax.tree.map(jnp.negative, values)
  twice = jnp.where(values[-1] < 0, 4, 2)  # Which the compiler cannot know, and so undo.
  return lax.fori_loop(0, twice, negative, values)


def update_ulps(old: list[jax.Array], new: list[jax.Array]) -> jax.Array:
  """Returns the root mean square change of rows of weights, over the unit in the last place of the
  old number; 0 of no rows.
  """

  def square(old, new):
    bits = jnp.finfo(old.dtype).nmant
    old, new = old.astype(jnp.float32), new.astype(jnp.float32)
    exponent = jnp.frexp(jnp.abs(old))[1] - 1
    # A weight of zero moves by any number of its own units: those of the smallest normal number.
    unit = jnp.ldexp(jnp.ones_like(old), jnp.maximum(exponent, -100) - bits)
    return jnp.sum(((new - old) / unit) ** 2 * (old != 0))

  total = sum(square(*pair) for pair in zip(old, new, strict=True))
  return jnp.sqrt(jnp.float32(total) / max(sum(x.size for x in old), 1))


def _ratio(part, whole):
  """`part / whole`, 0 where both are 0 or unknown."""
  return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)
