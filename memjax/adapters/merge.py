"""From adapted parameters back to plain ones, a matrix at a time."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.adapters.state import when
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

  A loop over layers whose carry is the base: in place where that is donated, also in the host's
  memory, and never a copy of more than one matrix.

  Args:
    leaf: Has `base`, and `delta()`, what is added: f32[..., m, n].
    key: As `merge`, of this leaf.
  """
  layers = _layers(leaf)
  if not layers:
    return add_update(leaf.base, leaf.delta(), key)
  add = lambda index, base: _add_layer(leaf, base, key, index)
  return jax.lax.fori_loop(0, layers[0], add, leaf.base)


def fold_all(leaves: Mapping[str, Any], keys: Mapping[str, jax.Array], due: jax.Array) -> dict:
  """Returns `{path: fold(leaf, key)}` where that is due, else the bases as they are.

  One loop over all layers, of no turns where it is not due: a GPU waits for its host to learn
  how many, and a TPU's compiler takes arrays in the host's memory in the outermost loop alone.

  Args:
    leaves: `{path: leaf}`, see `fold`.
    keys: Likewise.
    due: bool[].
  """
  bases, groups = {path: leaf.base for path, leaf in leaves.items()}, {}
  for path, leaf in leaves.items():
    groups.setdefault(_layers(leaf), []).append(path)

  def add(index, some):
    return {path: _add_layer(leaves[path], some[path], keys[path], index) for path in some}

  def add_plain(_, some):
    one = lambda path: add_update(some[path], over(leaves[path], some[path]).delta(), keys[path])
    return {path: one(path) for path in some}

  for layers, paths in groups.items():
    turns, body = (layers[0], add) if layers else (1, add_plain)
    some = {path: bases[path] for path in paths}
    bases |= jax.lax.fori_loop(0, jnp.where(due, turns, 0), body, some)
  return bases


def renewed(leaves: Mapping[str, Any], renew: Callable, key: jax.Array, due: jax.Array) -> dict:
  """Returns leaves after a restart, where it is due: what they added is in W, the rest drawn anew.

  Args:
    leaves: `{path: adapted leaf}`.
    renew: `renew(leaf, key) -> leaf`, given and returning a leaf without a base.
    key: Of this step; a leaf's draws and the rounding of its W have its path for an address.
    due: bool[].
  """
  keys = {path: jax.random.split(fold_in_path(key, path)) for path in leaves}
  bases = fold_all(leaves, {path: noise for path, (_, noise) in keys.items()}, due)
  draw = lambda rest: {path: renew(leaf, keys[path][0]) for path, leaf in rest.items()}
  rest = when(due, draw, {path: over(leaf, None) for path, leaf in leaves.items()})
  return {path: over(leaf, bases[path]) for path, leaf in rest.items()}


def _layers(leaf):
  """The axis of layers of an adapted leaf, as a shape; `()` without."""
  return jax.eval_shape(lambda leaf: leaf.delta(), leaf).shape[:-2]


def _add_layer(leaf, base, key, index):
  take = lambda x: _fetched(jax.lax.dynamic_index_in_dim(x, index))[0]
  old = jax.tree.map(take, base)
  # Over what the loop carries, lest it read a second copy of all layers.
  one = over(jax.tree.map(take, over(leaf, None)), old)
  new = add_update(old, one.delta(), None if key is None else jax.random.fold_in(key, index))
  write = lambda x, row: jax.lax.dynamic_update_index_in_dim(x, _beside(x, row[None]), index, 0)
  return jax.tree.map(write, base, new)


def _fetched(x):
  return jax.device_put(x, jax.memory.Space.Device) if _on_host(x) else x


def _beside(x, layer):
  """A layer, in the host's memory if the array is there that it is to be written to."""
  return jax.device_put(layer, jax.memory.Space.Host) if _on_host(x) else layer


def _on_host(x):
  return jax.typeof(x).memory_space == jax.memory.Space.Host


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
