"""32-bit copies of 16-bit parameters, in which updates too small for 16 bits add up.

Shapes in this file: a parameter is `[...]`, and so is its copy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class KeepMasterState(NamedTuple):
  """State of `keep_master`."""

  master: optax.Params  # f32[...] a 16-bit parameter; `optax.MaskedNode` for any other.
  inner: optax.OptState  # Of the inner transform, initialised on the copies.


def keep_master(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer on f32 copies of 16-bit parameters, and moves the parameters to the copies.

  Mixed-precision training as usual: the copies are what is trained, and each parameter is its copy
  rounded. Takes 4 bytes a 16-bit parameter beside the state of `inner`, whose moments become f32;
  parameters of 32 bits are their own copies. Communicates nothing.

  Example:
    >>> optimizer = keep_master(optax.sgd(0.001))
    >>> params = {'w': jnp.ones([], jnp.bfloat16)}
    >>> state = optimizer.init(params)
    >>> for _ in range(4):  # Each update is a quarter of the distance to the next number below.
    ...   updates, state = optimizer.update({'w': jnp.ones([], jnp.bfloat16)}, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> float(params['w']), round(float(state.master['w']), 4)
    (0.99609375, 0.996)

  Args:
    inner: A whole optimizer, learning rate included: its updates are added to the copies.

  Returns:
    A transform with state `KeepMasterState`. Its updates are f32 and have to be added as they are:
    `optax.apply_updates`, or `memjax.apply_updates` without a key.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    master = jax.tree.map(lambda p: _wide(p) if is_half(p) else optax.MaskedNode(), params)
    return KeepMasterState(master, inner.init(jax.tree.map(_wide, params)))

  def update(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError('keep_master moves the parameters to their copies: update(..., params)')
    masters = jax.tree.map(_choose, params, state.master)
    updates, after = inner.update(jax.tree.map(_wide, updates), state.inner, masters, **extra_args)
    moved = jax.tree.map(lambda m, u: m + u.astype(m.dtype), masters, updates)
    # Exact: two numbers this near each other have their difference in f32.
    updates = jax.tree.map(
      lambda p, m, u: m - _wide(p) if is_half(p) else u, params, moved, updates
    )
    master = jax.tree.map(lambda p, m: m if is_half(p) else optax.MaskedNode(), params, moved)
    return updates, KeepMasterState(master, after)

  return optax.GradientTransformationExtraArgs(init, update)


def _choose(param, master):
  return master if is_half(param) else param


def is_half(x) -> bool:
  """Whether an array is of floating numbers of 16 bits."""
  return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 2


def _wide(x: Any) -> Any:
  return x.astype(jnp.float32) if is_half(x) else x
