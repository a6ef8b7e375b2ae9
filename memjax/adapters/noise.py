"""The noise of a step inside adapted leaves, and its absence between steps."""

from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.adapters import pools
from memjax.naming import fold_in_path, path_string


def with_keys(params: Any, key: jax.Array) -> Any:
  """Returns parameters whose leaves draw their noise, such as dropout, from this key.

  Each leaf's key has an address: its path, then the layer. Leaves without noise stay as they are.

  Args:
    params: Adapted parameters.
    key: Of one step; its micro-batches fold in their number, see `memjax.weights.in_part`.
  """

  def renew(path, leaf):
    if getattr(leaf, 'key', None) is None or not hasattr(leaf, 'with_key'):
      return leaf
    return leaf.with_key(layer_keys(fold_in_path(key, path_string(path)), leaf.key.shape[:-1]))

  return jax.tree.map_with_path(renew, params, is_leaf=weights.is_weight)


def at_rest(params: Any) -> Any:
  """Returns parameters as validation and sampling see them: without noise, and without pools."""

  def rest(leaf):
    return leaf.with_key(None) if hasattr(leaf, 'with_key') else leaf

  return pools.without(jax.tree.map(rest, params, is_leaf=weights.is_weight))


def layer_keys(key: jax.Array, batch: tuple[int, ...]) -> jax.Array:
  """Returns raw keys `u32[*batch, k]`, one a layer; `batch` is () or (L,)."""
  if not batch:
    return jax.random.key_data(key)
  fold = lambda layer: jax.random.key_data(jax.random.fold_in(key, layer))
  return jax.vmap(fold)(jnp.arange(*batch))
