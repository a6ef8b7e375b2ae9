"""A limit on how fast updates may grow."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms.units import at_least_float32, batch_shape, map_with_path, unit_axes


class LimitNormGrowthState(NamedTuple):
  """State of `limit_norm_growth`."""

  norm: optax.Updates  # f32[...] per leaf [..., m, n] or [..., n]; 0 before the first update.


def limit_norm_growth(growth: float = 1.01) -> optax.GradientTransformation:
  r"""Shortens updates whose norm grows by more than 1 % from one update to the next.

  With :math:`\|U_t\|` the norm of one matrix of a leaf `[..., m, n]`, or of one vector,

  .. math::
    U_t \leftarrow U_t \cdot \min(1, \gamma \|U_{t-1}\| / \|U_t\|),

  where :math:`U_{t-1}` is the update as it was shortened. An update of zeros, or one that is not
  finite, is not remembered: the limit stays where it was. Keeps one f32 number a matrix;
  communicates one sum a matrix.

  Example:
    >>> transform = limit_norm_growth()
    >>> state = transform.init(jnp.zeros([2, 2]))
    >>> for size in (1.0, 10.0, 0.5):
    ...   update, state = transform.update(jnp.full([2, 2], size), state)
    ...   print(f'{update[0, 0]:.4f}')
    1.0000
    1.0100
    0.5000

  Args:
    growth: Largest ratio :math:`\gamma` of the norms of successive updates, at least 1.

  Raises:
    ValueError: for a growth below 1.

  References:
    Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
    <https://arxiv.org/abs/2410.01623>`_, 2024
  """
  if not isinstance(growth, jax.Array) and growth < 1:
    raise ValueError(f'growth is a ratio of norms and must be at least 1, got {growth!r}')

  def init(params):
    return LimitNormGrowthState(
      map_with_path(lambda path, p: jnp.zeros(batch_shape(path, p), at_least_float32(p)), params)
    )

  def update(updates, state, params=None):
    del params
    paired = map_with_path(limit, updates, state.norm)
    pick = lambda i: jax.tree.map(lambda pair: pair[i], paired, is_leaf=lambda x: type(x) is tuple)
    return pick(0), LimitNormGrowthState(pick(1))

  def limit(path, update, previous):
    axes = unit_axes(path, update)
    wide = update.astype(at_least_float32(update))
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=axes))
    most = jnp.where(previous > 0, growth * previous, norm)
    factor = jnp.where(norm > most, most / norm, 1)
    limited = wide * jnp.expand_dims(factor, axes)
    remember = jnp.isfinite(norm) & (norm > 0)
    return limited.astype(update.dtype), jnp.where(remember, factor * norm, previous)

  return optax.GradientTransformation(init, update)
