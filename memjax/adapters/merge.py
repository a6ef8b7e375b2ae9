"""From adapted parameters back to plain ones, a matrix at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.naming import fold_in_path, path_string
from memjax.transforms.rounding import add_update


def merge(params: Any, key: jax.Array | None = None, dtype: Any = None) -> Any:
  """Returns plain parameters in which additions are part of the matrices.

  Each sum is formed in f32, one matrix at a time, and is rounded once. Rounding to nearest loses
  what is under half a step of a bf16 or 8-bit weight, and in 4 bits a small adapter whole; a key
  keeps it on average. Jit it with the parameters donated, and matrices are changed in place.

  Args:
    params: Adapted parameters, or those of `compressed`.
    key: Key of the stochastic rounding; None rounds to nearest. A matrix's noise has an address:
      its path, then the layer.
    dtype: Of the arrays that matrices become which were adapted or are held in codes, such as
      bfloat16 for a model trained over 4 bits; None leaves each in the form of its W.

  >>> import jax.numpy as jnp
  >>> leaf = weights.Adapted(jnp.zeros((2, 2)), a=jnp.ones((2, 1)), b=jnp.ones((1, 2)), scale=0.5)
  >>> merge({'kernel': leaf})['kernel'].tolist()
  [[0.5, 0.5], [0.5, 0.5]]
  """

  def plain(path, leaf):
    leaf = leaf.value if isinstance(leaf, weights.Frozen) else leaf
    noise = None if key is None else fold_in_path(key, path_string(path))
    if weights.is_weight(leaf) and (dtype is not None or isinstance(leaf, weights.Product)):
      return _array(leaf, noise, dtype or weights.whole(leaf).dtype)
    return fold(leaf, noise) if hasattr(leaf, 'delta') else leaf

  return jax.tree.map_with_path(plain, params, is_leaf=weights.is_weight)


def detach(params: Any) -> Any:
  """Returns the parameters as they were before `attach`, without what was added.

  Raises:
    ValueError: naming a leaf whose weight has changed since, by restarts or switches.
  """

  def original(path, leaf):
    if isinstance(leaf, weights.Restarted):
      raise ValueError(
        f'{path_string(path)}: restarts add to the weight, and what it was before is not kept; '
        'merge, or load the parameters that were adapted again'
      )
    return _base(leaf)

  return jax.tree.map_with_path(original, params, is_leaf=weights.is_weight)


def fold(leaf: Any, key: jax.Array | None = None) -> Any:
  """Returns the base of an adapted leaf plus what the leaf adds to it.

  A loop over layers whose carry is the base: in place where that is donated, and never a copy of
  more than one matrix.

  Args:
    leaf: Has `base`, and `delta()`, what is added: f32[..., m, n].
    key: As `merge`, of this leaf.
  """
  stacked = jax.eval_shape(lambda leaf: leaf.delta(), leaf).shape[:-2]
  if not stacked:
    return add_update(leaf.base, leaf.delta(), key)

  def add_layer(index, base):
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), leaf)
    old = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), base)
    noise = None if key is None else jax.random.fold_in(key, index)
    # Over what the loop carries, lest it read a second copy of all layers.
    new = add_update(old, over(one, old).delta(), noise)
    write = lambda x, row: jax.lax.dynamic_update_index_in_dim(x, row, index, 0)
    return jax.tree.map(write, base, new)

  return jax.lax.fori_loop(0, stacked[0], add_layer, leaf.base)


def _array(leaf, key, dtype):
  """What a leaf stands for as an array, a layer at a time."""

  def one(leaf, key):
    total = weights.materialize(getattr(leaf, 'base', leaf)).astype(jnp.float32)
    total = total + leaf.delta() if hasattr(leaf, 'delta') else total
    return add_update(jnp.zeros(total.shape, dtype), total, key)

  whole = weights.whole(leaf).shape
  if len(whole) == 2:
    return one(leaf, key)
  noise = lambda index: None if key is None else jax.random.fold_in(key, index)
  layers = (leaf, jnp.arange(whole[0]))
  return jax.lax.map(lambda layer: one(layer[0], noise(layer[1])), layers)


def over(leaf: Any, base: Any) -> Any:
  """Returns an adapted leaf with another base."""
  inner = getattr(leaf, 'adapted', None)
  if inner is not None:
    return dataclasses.replace(leaf, adapted=over(inner, base))
  return dataclasses.replace(leaf, base=base)


def _base(leaf):
  if isinstance(leaf, weights.Frozen):
    return leaf.value
  return leaf.base if hasattr(leaf, 'delta') else leaf
