"""Clipping gradients by their norm: all together, or layer by layer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

KINDS = ('global', 'layer')


def check(clip_by: str) -> None:
  """Raises a `ValueError` for a way of clipping that does not exist."""
  if clip_by not in KINDS:
    raise ValueError(f'clip_by {clip_by!r} does not exist; there are {", ".join(KINDS)}')


def clipped(walk: Callable, last, carry: dict, use: Callable, clip_norm, clip_by: str):
  """Runs a backward pass whose gradients are clipped before they are used.

  Clipping by the norm of all gradients together takes another pass before it, which only measures.

  Args:
    walk: `walk(last, carry, use) -> (loss, carry)`, the pass.
    last: Hidden states after the last block.
    carry: Dict; its `square` is the sum of squares f32[] so far.
    use: `use(carry, grads, *where) -> carry`.
    clip_norm: Largest norm; None does not clip.
    clip_by: 'global' or 'layer'.

  Returns:
    The mean loss f32[], and the last carry.
  """

  def measure(carry, grads, *where):
    del where
    return {**carry, 'square': carry['square'] + square(grads)}

  total = None
  if clip_norm is not None and clip_by == 'global':
    _, measured = walk(last, carry, measure)
    # Without the barrier both passes would share the head's gradient, and keep it in between.
    last, total = jax.lax.optimization_barrier((last, jnp.sqrt(measured['square'])))

  def clip_and_use(carry, grads, *where):
    grads, found = with_square(grads)
    carry = {**carry, 'square': carry['square'] + found}
    if total is not None:
      grads = by_norm(grads, total, clip_norm)
    elif clip_norm is not None:
      grads = by_group(grads, clip_norm)
    return use(carry, grads, *where)

  return walk(last, carry, clip_and_use)


def square(tree) -> jax.Array:
  """Returns the sum of squares f32[] over all leaves, summed in f32 whatever their dtype."""
  return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree))


def with_square(grads):
  """Returns the gradients and their `square`, which is computed before they are used: what
  overwrites them would else copy them first.
  """
  leaves, treedef = jax.tree.flatten(grads)
  pairs = [jax.lax.optimization_barrier((x, square(x))) for x in leaves]
  return treedef.unflatten(x for x, _ in pairs), sum(found for _, found in pairs)


def by_norm(tree, norm, clip_norm: float):
  """Shortens `tree` as a gradient of this norm must be to have at most `clip_norm`."""
  factor = jnp.minimum(1.0, clip_norm / norm)
  return jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree)


def by_group(grads: dict, clip_norm: float, stack: str | None = None) -> dict:
  """Shortens each group of gradients (embedding, last norm, head, a layer) by its own norm.

  Args:
    grads: Name -> tree of gradients.
    clip_norm: Largest norm of a group.
    stack: Name of a group whose leaves are `[L, ...]`, each layer a group; None for none.
  """
  clip = lambda tree: by_norm(tree, jnp.sqrt(square(tree)), clip_norm)
  return {name: (jax.vmap(clip) if name == stack else clip)(tree) for name, tree in grads.items()}
