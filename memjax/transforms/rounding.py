"""Adding updates to parameters that have fewer bits than the sum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memjax.naming import fold_in_path, path_string
from memjax.transforms import explicit
from memjax.weights import Int8, is_weight


def apply_updates(params, updates, key: jax.Array | None = None, layer: jax.Array | None = None):
  """Adds updates to parameters; with a key, bf16 and `Int8` leaves are rounded stochastically.

  Rounding to nearest loses every update under half an ulp, for bf16 a 512th of the weight, and
  training stalls. A sum rounded up or down with odds by its distance keeps the mean of the updates.
  All other dtypes are added as `optax.apply_updates` does.

  The noise has an address: the key, the leaf's path, the index along its first axis (an `Int8`
  matrix `[m, n]` has one address). A step that updates stacked leaves layer by layer says which,
  and draws the same bits; so does any sharding.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> params = {'w': jnp.ones([4, 4096], jnp.bfloat16)}
    >>> updates = {'w': jnp.full([4, 4096], 0.001)}
    >>> float(jnp.mean(apply_updates(params, updates)['w'], dtype=jnp.float32))
    1.0
    >>> moved = apply_updates(params, updates, key=jax.random.key(0))
    >>> print(f"{jnp.mean(moved['w'], dtype=jnp.float32):.4f}")
    1.0010

  Args:
    params: Pytree of arrays or `memjax.weights.Int8`.
    updates: Pytree of the same structure and shapes, all arrays; see `memjax.weights.dense`.
    key: Key of this update, for instance `fold_in(root, step)`; None rounds to nearest.
    layer: i32[], the layer that all leaves are, `[1, ...]` of `[L, ...]`; None for whole leaves.

  Returns:
    New parameters in the dtypes of the old.
  """

  def add_all(params, updates, key, layer):
    is_leaf = lambda x: x is None or isinstance(x, Int8)
    named, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
    new = []
    for (path, param), update in zip(named, treedef.flatten_up_to(updates), strict=True):
      if is_weight(param) and new:
        # Apart: the compiler would else round matrices of one shape in one fusion, and hold both.
        update, new[-1] = jax.lax.optimization_barrier((update, new[-1]))
      new.append(_add(key, layer, path, param, update))
    return treedef.unflatten(new)

  return explicit.on_auto_axes(add_all, params, params, updates, key, layer)


def _add(key, layer, path, param, update):
  coded = is_weight(param)
  if param is None or not (coded or (param.dtype == jnp.bfloat16 and key is not None)):
    return optax.apply_updates(param, update)
  if key is None:
    return add_update(param, update)
  leaf_key = fold_in_path(key, path_string(path))
  if update.ndim < (3 if coded else 2):
    return add_update(param, update, leaf_key)
  key_of = lambda layer: jax.random.fold_in(leaf_key, layer.astype(jnp.uint32))
  if layer is not None:
    # Not by `vmap`: with an axis of size 1 in front, XLA for TPU keeps another f32 array of the
    # matrix while it rounds to 8 bits.
    one = add_update(jax.tree.map(lambda x: x[0], param), update[0], key_of(layer))
    return jax.tree.map(lambda x: x[None], one)
  return jax.vmap(add_update)(param, update, jax.vmap(key_of)(jnp.arange(update.shape[0])))


def add_update(param, update: jax.Array, key: jax.Array | None = None):
  """Returns one parameter plus its update, summed in f32 or better.

  Args:
    param: An array, or a weight in codes with a method `add`, such as `memjax.weights.Int8`.
    update: Array of its shape.
    key: Key of the stochastic rounding of bf16 and of codes; None rounds to nearest.
  """
  if is_weight(param):
    return param.add(update, key)
  total = param.astype(jnp.promote_types(param.dtype, jnp.float32)) + update
  if key is None or param.dtype != jnp.bfloat16:
    return total.astype(param.dtype)
  return round_stochastically(total.astype(jnp.float32), key)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds f32 to one of the two nearest bf16 numbers, to each with the odds of its nearness.

  bf16 is the upper half of f32: adding 16 random bits to the lower half carries into the upper with
  just those odds. NaN and the infinities have no neighbours and stay.
  """
  noise = jax.random.bits(key, x.shape, jnp.uint32) & np.uint32(0xFFFF)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  rounded = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
