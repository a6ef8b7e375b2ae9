"""How an answer found in a subspace becomes an update of the whole matrix.

Shapes in this file: a gradient `G` is `[..., m, n]`, its projection `R` and the inner transform's
answer `U` are `[..., r, n]` or `[..., m, r]`; a channel is a column of the former or a row of the
latter.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax

from memjax.transforms.limiter import limit_norm_growth
from memjax.transforms.targets import Plan


class Lift(NamedTuple):
  """The way back from the subspace: an update is `within + outside.update(without)`."""

  # (plan, scale, back, G, R, U) -> (within, without), `[..., m, n]` or None for none; `back` maps
  # [..., r, n] to [..., m, n]. G is None if `reads_gradient` is False.
  split: Callable
  # Full-size transform that the part from outside the subspace goes through; None if there is none.
  outside: optax.GradientTransformation | None = None
  # What it takes: gradients of full size, a basis with orthonormal columns, a projection of one
  # side.
  reads_gradient: bool = True
  orthonormal: bool = False
  one_sided: bool = True


def back() -> Lift:
  """`scale P U`: the update stays in the subspace, as in GaLore."""

  def split(plan, scale, back, gradient, projected, answer):
    del plan, gradient, projected
    return scale * back(answer), None

  return Lift(split, reads_gradient=False, one_sided=False)


def residual(limit: optax.GradientTransformation | None = None, removed: float = 1.0) -> Lift:
  r"""`scale P U` and what the subspace leaves out of the gradient, :math:`\phi (G - P R)`.

  :math:`\phi = \|U\| / \|R\|`, channel by channel: how much the inner transform scaled the part
  that it saw stands for how much it would have scaled the rest.

  Args:
    limit: Transform that the second part goes through; `limit_norm_growth()` if None.
    removed: Share of `P R` that is taken from the gradient.
  """

  def split(plan, scale, back, gradient, projected, answer):
    rest = gradient - removed * back(projected)
    return scale * back(answer), _ratio(answer, projected, _channel_axis(plan)) * rest

  return Lift(split, limit_norm_growth() if limit is None else limit, orthonormal=True)


def rescale(
  by: Literal['channel', 'tensor'] = 'channel', limit: optax.GradientTransformation | None = None
) -> Lift:
  r"""The gradient itself, scaled as the inner transform scaled its projection.

  The update is :math:`\mathrm{scale} \cdot G \, \|U\| / \|R\|`, with norms of channels or of whole
  matrices. There is no way back through the basis, which need not be kept, nor be orthonormal.

  Args:
    by: What shares a factor: a `'channel'` or a `'tensor'`, one matrix.
    limit: Transform that updates go through; `limit_norm_growth()` if None.

  Raises:
    ValueError: for another word.
  """
  if by not in ('channel', 'tensor'):
    raise ValueError(f"a factor is shared by 'channel' or by 'tensor', got {by!r}")

  def split(plan, scale, back, gradient, projected, answer):
    del back
    axis = _channel_axis(plan) if by == 'channel' else (-2, -1)
    return None, scale * _ratio(answer, projected, axis) * gradient

  return Lift(split, limit_norm_growth() if limit is None else limit)


def _channel_axis(plan: Plan) -> int:
  """The axis that holds the `r` numbers of a channel."""
  return -2 if plan.left else -1


def _ratio(answer, projected, axis):
  """Quotient of two norms, 0 where the gradient is."""
  norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))
  size = norm(projected)
  return jnp.where(size > 0, norm(answer) / jnp.where(size > 0, size, 1), 0)
