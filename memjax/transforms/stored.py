"""Transforms whose state is stored in another form than the one they compute in.

Shapes in this file: a large leaf `[L, m, n]` or `[m, n]` is updated in `c` slices, of all arrays
that belong to it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from memjax.naming import path_string
from memjax.transforms import slices


class Belongs(NamedTuple):
  """Where a leaf of the inner transform's state belongs; static."""

  owner: int  # Index of its parameter in `jax.tree.leaves(params)`.
  path: str  # Path of its parameter.
  name: str  # Field that holds it: 'mu'.


def find(state, params, shapes=None) -> dict[int, Belongs]:
  """Finds the leaves of a state that belong to parameters and have their shape.

  A leaf belongs to the parameter whose path ends its own, `0/mu/blocks/attn/q/kernel`.

  Args:
    state: State of a transform.
    params: Parameters, or their gradients.
    shapes: Shapes of the state's leaves; their own if None. Stored leaves may have others.

  Returns:
    Index in `jax.tree.leaves(state)` -> where it belongs.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  owners = {tuple(path): (k, leaf) for k, (path, leaf) in enumerate(leaves)}
  found = {}
  for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
    shape = leaf.shape if shapes is None else shapes[i]
    for at in range(1, len(path) + 1):
      k, owner = owners.get(tuple(path[at:]), (None, None))
      if k is not None and shape == owner.shape:
        name = path_string(path[at - 1 : at])
        found[i] = Belongs(k, path_string(path[at:]), name)
        break
  return found


def update(
  inner: optax.GradientTransformationExtraArgs,
  updates: Any,
  state_tree: Any,
  stored: list,
  params: Any,
  extra_args: dict,
  *,
  decode: Callable[[int, Any], jax.Array],
  encode: Callable[[int, jax.Array, Any], Any],
  owners: dict[int, int],
  cuts: dict[int, slices.Counts],
) -> tuple[Any, list]:
  """Decodes the state, runs `inner`, encodes the state.

  If `inner` is elementwise this happens in slices for the leaves in `cuts`, each alone and in
  place, and in one go for all others.

  Args:
    inner: Transform to run.
    updates: Gradients.
    state_tree: Structure of `inner`'s state.
    stored: Its leaves as stored, each an array or a tuple of arrays.
    params: Parameters, or None.
    extra_args: For `inner`.
    decode: (index in `stored`, stored leaf or a slice of it) -> what `inner` sees.
    encode: (index, what `inner` returns, stored leaf it replaces) -> stored leaf.
    owners: Index in `stored` -> index of the gradient it belongs to.
    cuts: Index of a gradient -> numbers of slices.

  Returns:
    Updates, stored leaves.
  """
  gradients, tree = jax.tree.flatten(updates)
  gradients = dict(enumerate(gradients))
  stored = dict(enumerate(stored))
  params = None if params is None else dict(enumerate(tree.flatten_up_to(params)))

  def compute(gradients, state, params):
    """Updates some leaves; `inner` sees the others as MaskedNodes, that is, not at all."""
    out, state_after = inner.update(
      _unflatten(tree, gradients),
      _unflatten(state_tree, state),
      None if params is None else _unflatten(tree, params),
      **extra_args,
    )
    out, state_after = tree.flatten_up_to(out), state_tree.flatten_up_to(state_after)
    return {k: out[k] for k in gradients}, {i: state_after[i] for i in state}

  def decode_all(stored):
    return {i: decode(i, x) for i, x in stored.items()}

  def step(gradients, stored, params):
    out, state = compute(gradients, decode_all(stored), params)
    return out, {i: encode(i, state[i], x) for i, x in stored.items()}

  if cuts and not slices.is_elementwise(
    compute, gradients, jax.eval_shape(decode_all, stored), params
  ):
    cuts = {}
  shared = {i: x for i, x in stored.items() if owners.get(i) not in cuts}
  done = {}, {}
  for k, counts in cuts.items():
    scalars = {i: x for i, x in shared.items() if i not in owners}

    def step_slice(at, carry, count, k=k, scalars=scalars):
      gradient, owned = carry
      one = None if params is None else {k: slices.view(params[k], count)[at]}
      out, after = step({k: gradient}, owned | scalars, one)
      return out[k], {i: after[i] for i in owned}

    owned = {i: x for i, x in stored.items() if owners.get(i) == k}
    done[0][k], after = slices.run(step_slice, (gradients[k], owned), counts)
    done[1].update(after)
  rest = lambda tree: None if tree is None else {k: x for k, x in tree.items() if k not in cuts}
  out, after = step(rest(gradients), shared, rest(params))
  out, after = out | done[0], after | done[1]
  return _unflatten(tree, out), [after[i] for i in range(len(stored))]


def _unflatten(tree, leaves: dict):
  return tree.unflatten(leaves.get(i, optax.MaskedNode()) for i in range(tree.num_leaves))
