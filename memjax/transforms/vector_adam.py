"""Adam in which every vector of a low-rank factor counts its own updates.

Shapes in this file: factors are `a[..., m, r]` and `b[..., r, n]`; leading axes are batch
(scan-stacked layers). The `r` columns of `a` and the `r` rows of `b` are their vectors.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.naming import path_string
from memjax.transforms import explicit
from memjax.transforms.float32 import in_float32


class VectorAdamState(NamedTuple):
  """State of `scale_by_vector_adam`."""

  count: jax.Array  # i32[], updates seen so far, of all leaves that are not factors.
  counts: Any  # Of factors: i32[..., 1, r] of `a`, i32[..., r, 1] of `b`; None for other leaves.
  mu: optax.Updates  # First moments, the leaf's shape.
  nu: optax.Updates  # Second moments.


def scale_by_vector_adam(
  b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, hold: bool = True
) -> optax.GradientTransformation:
  """Adam whose bias correction is each vector's own, for factors that begin anew one by one.

  A method that exchanges a vector of a factor, or all of them, sets state back to zero: moments and
  this count, and the vector's next update is Adam's first. Leaves whose path does not end in `a` or
  `b` get Adam as optax has it.

  Keeps `2 r (m + n) + 2 r` numbers for a pair of factors. Sharded along a vector, an update
  communicates `r` truth values a factor, whether its vectors have seen a gradient.

  Example:
    >>> state = scale_by_vector_adam().init({'a': jnp.zeros([3, 8, 2]), 'norm': jnp.zeros([8])})
    >>> state.counts['a'].shape, state.counts['norm']
    ((3, 1, 2), None)

  Args:
    b1: Decay rate of the first moment.
    b2: Decay rate of the second.
    eps: Added to the corrected root of the second.
    hold: Holds a vector's count at zero until it sees a gradient, so that one that is frozen for a
      while begins with a first update. The official SwitchLoRA counts on, which makes the first
      update after 5 frozen steps 0.52 of that size, and later ones up to 1.06.

  Returns:
    A transform with state `VectorAdamState`; it does not read `params`.

  References:
    Zhou et al., `SwitchLoRA <https://arxiv.org/abs/2406.06564>`_, 2024
  """

  def init(params):
    zeros = lambda x: jnp.zeros_like(x)
    return VectorAdamState(
      jnp.zeros((), jnp.int32),
      jax.tree.map_with_path(_counts, params),
      jax.tree.map(zeros, params),
      jax.tree.map(zeros, params),
    )

  def update(updates, state, params=None):
    del params
    return explicit.on_auto_axes(step, (updates, state), updates, state)

  def step(updates, state):
    count = optax.safe_increment(state.count)
    leaves, treedef = jax.tree.flatten_with_path(updates)
    counts = treedef.flatten_up_to(state.counts)
    moments = zip(jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True)
    new = [
      one(path, g, c, mu, nu, count)
      for (path, g), c, (mu, nu) in zip(leaves, counts, moments, strict=True)
    ]
    scaled, counts, mu, nu = (treedef.unflatten(part) for part in zip(*new, strict=True))
    return scaled, VectorAdamState(count, counts, mu, nu)

  def one(path, g, counts, mu, nu, count):
    axis = _along(path, g)
    if axis is not None:
      seen = jnp.any((g != 0) | (mu != 0), axis, keepdims=True) if hold else True
      counts = counts + jnp.where(seen, 1, 0)
      count = jnp.maximum(counts, 1)
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * jnp.square(g)
    count = count.astype(jnp.float32)
    root = jnp.sqrt(nu / (1 - b2**count)) + eps
    return mu / (1 - b1**count) / root, counts, mu, nu

  return optax.GradientTransformation(init, update)


def vector_adam(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  hold: bool = True,
  weight_decay: float = 0.0,
  mask: Any = None,
  eta: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """`scale_by_vector_adam`, decoupled weight decay and learning rate; state in f32.

  Args:
    learning_rate: A number or an optax schedule.
    b1: As `scale_by_vector_adam`.
    b2: As `scale_by_vector_adam`.
    eps: As `scale_by_vector_adam`.
    hold: As `scale_by_vector_adam`.
    weight_decay: Decoupled decay, times the learning rate.
    mask: Leaves to decay, as in `optax.adamw`.
    eta: Of the proximal term `|b|^2 / (2 eta)` of random subspace optimisation; its gradient `b /
      eta` is decoupled from the moments, as decay is. 0 is no such term.

  Raises:
    ValueError: for a negative `eta`.
  """
  if eta < 0:
    raise ValueError(f'eta is {eta}; the proximal term divides by it, so it is above 0, or 0: none')
  steps = optax.chain(
    scale_by_vector_adam(b1, b2, eps, hold=hold),
    optax.add_decayed_weights(weight_decay, mask),
    optax.add_decayed_weights(1 / eta if eta else 0.0, is_second_factor),
    optax.scale_by_learning_rate(learning_rate),
  )
  return in_float32(steps)


def is_second_factor(params: optax.Params) -> Any:
  """Which leaves are the factor `b` of an adapted matrix."""
  return jax.tree.map_with_path(lambda path, leaf: _along(path, leaf) == -1, params)


def _along(path, leaf) -> int | None:
  """The axis along which a factor's vectors lie, or None for what is no factor."""
  axes = {'a': -2, 'b': -1}
  return axes.get(path_string(path[-1:])) if leaf.ndim > 1 else None


def _counts(path, leaf):
  axis = _along(path, leaf)
  if axis is None:
    return None
  shape = list(leaf.shape)
  shape[axis] = 1
  return jnp.zeros(shape, jnp.int32)
