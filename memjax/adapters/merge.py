"""From adapted parameters back to plain ones, a matrix at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.naming import fold_in_path, path_string
from memjax.transforms.rounding import add_update


def merge(params: Any, key: jax.Array | None = None) -> Any:
  """Returns plain parameters in which additions are part of the matrices.

  Each sum is formed in f32, one matrix at a time, and is rounded once. Rounding to nearest loses
  what is under half a step of a bf16 or 8-bit weight; a key keeps it on average. Jit it with the
  parameters donated, and matrices are changed in place.

  Args:
    params: Adapted parameters.
    key: Key of the stochastic rounding; None rounds to nearest. A matrix's noise has an address:
      its path, then the layer.

  >>> import jax.numpy as jnp
  >>> leaf = weights.Adapted(jnp.zeros((2, 2)), a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=0.5)
  >>> merge({'kernel': leaf})['kernel'].tolist()
  [[0.5, 0.5], [0.5, 0.5]]
  """

  def plain(path, leaf):
    if hasattr(leaf, 'delta'):
      return fold(leaf, None if key is None else fold_in_path(key, path_string(path)))
    return _base(leaf)

  return jax.tree.map_with_path(plain, params, is_leaf=weights.is_weight)


def detach(params: Any) -> Any:
  """Returns the parameters as they were before `attach`, without what was added."""
  return jax.tree.map(_base, params, is_leaf=weights.is_weight)


def fold(leaf: Any, key: jax.Array | None = None, due: jax.Array | bool = True) -> Any:
  """Returns the base of an adapted leaf plus what the leaf adds to it.

  A loop over layers whose carry is the base: in place where that is donated, and when the sum is
  not due a loop that runs no times, which copies nothing.

  Args:
    leaf: Has `base`, and `delta()`, what is added: f32[..., m, n].
    key: As `merge`, of this leaf.
    due: bool[], whether to add at all.
  """
  stacked = jax.eval_shape(lambda leaf: leaf.delta(), leaf).shape[:-2]
  if not stacked:
    add = lambda _, base: add_update(base, leaf.delta(), key)
    return jax.lax.fori_loop(0, jnp.where(due, 1, 0), add, leaf.base)

  def add_layer(index, base):
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), leaf)
    old = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), base)
    noise = None if key is None else jax.random.fold_in(key, index)
    new = add_update(old, _above(one, old).delta(), noise)
    write = lambda x, row: jax.lax.dynamic_update_index_in_dim(x, row, index, 0)
    return jax.tree.map(write, base, new)

  return jax.lax.fori_loop(0, jnp.where(due, stacked[0], 0), add_layer, leaf.base)


def _above(leaf, base):
  """The leaf over what the loop carries, lest the loop read a second copy of all layers."""
  inner = getattr(leaf, 'adapted', None)
  if inner is not None:
    return dataclasses.replace(leaf, adapted=_above(inner, base))
  return dataclasses.replace(leaf, base=base)


def _base(leaf):
  if isinstance(leaf, weights.Frozen):
    return leaf.value
  return leaf.base if hasattr(leaf, 'delta') else leaf
