"""Optimizer state in bfloat16, rounded stochastically.

Shapes in this file: a parameter is `[..., m, n]`, and so are its moments.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memjax.naming import fold_in_path, path_string
from memjax.transforms import explicit
from memjax.transforms import stored as stored_lib
from memjax.transforms.float32 import in_float32
from memjax.transforms.layers import Layer
from memjax.transforms.rounding import round_stochastically


class RoundState(NamedTuple):
  """State of `round_state`."""

  count: jax.Array  # i32[], updates seen so far; an address of the noise.
  inner: optax.OptState  # Of the inner transform; bf16 in a parameter's shape, else as it is.


def round_state(
  inner: optax.GradientTransformation, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the moments of `inner` in bfloat16, rounded up or down with odds by nearness.

  Rounded to nearest, a second moment with `b2 = 0.999` never decays: a thousandth of it is less
  than half of bf16's last place. Rounded stochastically it decays in the mean, and one bf16 number
  does what it would in f32, plus noise of one part in 256 at most.

  Takes 2 bytes a number; Adam 4 a parameter, against 8. Communicates nothing. The noise is drawn at
  the update's count, the state leaf's path and the index along its first axis, so that no mesh and
  no restart changes it.

  Example:
    >>> optimizer = round_state(optax.scale_by_adam())
    >>> optimizer.init({'w': jnp.zeros([4, 6])}).inner.nu['w'].dtype
    dtype(bfloat16)

  Args:
    inner: Any transform. It computes in f32.
    seed: Seed of the noise.

  Returns:
    A transform with state `RoundState`. Its `update` takes the extra argument `layer`, see
    `memjax.transforms.layers.Layer`, for steps that see single layers: their noise is the stack's.
  """
  inner = in_float32(inner)

  def init(params):
    state = inner.init(params)
    leaves, tree = jax.tree.flatten(state)
    belongs = stored_lib.find(state, params)
    leaves = [
      x.astype(jnp.bfloat16) if i in belongs and x.dtype == jnp.float32 else x
      for i, x in enumerate(leaves)
    ]
    return RoundState(jnp.zeros([], jnp.int32), tree.unflatten(leaves))

  def update(updates, state, params=None, **extra_args):
    return explicit.on_auto_axes(step, (updates, state), updates, state, params, extra_args)

  def step(updates, state, params, extra_args):
    layer = extra_args.get('layer')
    key = jax.random.fold_in(jax.random.key(seed), state.count)
    belongs = stored_lib.find(state.inner, updates)
    stored = lambda i, x: i in belongs and x.dtype == jnp.bfloat16
    paths, tree = jax.tree_util.tree_flatten_with_path(state.inner)
    wide = [x.astype(jnp.float32) if stored(i, x) else x for i, (_, x) in enumerate(paths)]
    updates, after = inner.update(updates, tree.unflatten(wide), params, **extra_args)
    rounded = [
      _round(new, fold_in_path(key, path_string(path)), _first(layer, belongs[i].path, new))
      if stored(i, old)
      else new
      for i, ((path, old), new) in enumerate(zip(paths, tree.flatten_up_to(after)))
    ]
    return updates, RoundState(optax.safe_increment(state.count), tree.unflatten(rounded))

  return optax.GradientTransformationExtraArgs(init, update)


def _first(layer: Layer | None, path: str, leaf):
  """Index along the first axis of the whole leaf at which this one begins."""
  held = layer is not None and layer.holds(path)
  return layer.index.astype(jnp.uint32) * np.uint32(leaf.shape[0]) if held else np.uint32(0)


def _round(x, key, first):
  if x.ndim < 2:
    return round_stochastically(x, key)
  fold = lambda index: jax.random.fold_in(key, index)
  keys = jax.vmap(fold)(first + jnp.arange(x.shape[0], dtype=jnp.uint32))
  return jax.vmap(round_stochastically)(x, keys)
