"""Gradient accumulation in the subspace.

Between two bases GaLore needs of each micro-batch only its gradient's projection: a sum over
micro-batches takes `[..., r, n]` numbers and not `[..., m, n]`. A step over micro-batches
`0 .. k - 1` that accumulates in the subspace:

    def body(carry, part):
      opt, total = carry
      index, batch = part
      grads = jax.grad(loss)(params, batch)
      opt = refresh_subspace(transform, grads, opt, params, when=index == 0)
      reduced = project_gradient(grads, opt)
      return (opt, jax.tree.map(jnp.add, total, reduced)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(project_gradient, params, opt))
    (opt, total), _ = jax.lax.scan(body, (opt, zeros), (jnp.arange(k), batches))
    mean = jax.tree.map(lambda x: x / k, total)
    updates, opt = transform.update(mean, opt, params, projected=True)

A basis comes from the gradient of the first micro-batch alone, the one point in which this is not
the update of the mean gradient: the sum does not exist when the basis is needed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from memjax.naming import path_string
from memjax.transforms.project import ProjectState
from memjax.transforms.storage import PackedBases, unpack
from memjax.transforms.units import at_least_float32


def refresh_subspace(
  transform: optax.GradientTransformationExtraArgs,
  grads: Any,
  state: Any,
  params: Any,
  when=True,
  **extra_args,
) -> Any:
  """Gives the matrices that are due in the coming update new bases, and does nothing else.

  Args:
    transform: Any optax transform with `project` somewhere inside.
    grads: Gradient of one micro-batch.
    state: Its state.
    params: Parameters.
    when: bool or bool[]; False leaves `state` as it is, at no cost.
    **extra_args: Of the transform's `update`.

  Returns:
    The state for the micro-batches and the update to come: counts are not advanced, moments are
    rotated if they are to be.
  """
  _find(state)
  _, after = transform.update(grads, state, params, only_refresh=jnp.asarray(when), **extra_args)
  # What comes after `project` in a chain took the gradients for updates; of that nothing is kept.
  keep = lambda old, new: new if isinstance(old, ProjectState) else old
  return jax.tree.map(keep, state, after, is_leaf=_is_project)


def project_gradient(grads: Any, state: Any) -> Any:
  """Projects a gradient, or a sum of gradients, to the bases that a state holds.

  Args:
    grads: Tree of `[..., m, n]` and other leaves.
    state: Optimizer state with a `ProjectState` somewhere inside, or several that hold bases of
      different leaves (`optax.partition`).

  Returns:
    Tree with `[..., r, n]`, `[..., m, r]` or `[..., r, r]` in place of the matrices that have
    bases; all leaves in f32 (f64 for f64). Means of it go to `transform.update(mean, state, params,
    projected=True)`.

  Raises:
    ValueError: if there is no `ProjectState`.
  """
  found = _find(state)
  left = {path: basis for each in found for path, basis in _bases(each.left, -2).items()}
  right = {path: basis for each in found for path, basis in _bases(each.right, -1).items()}

  def reduce(path, leaf):
    path = path_string(path)
    leaf = leaf.astype(at_least_float32(leaf))
    if path in left:
      leaf = left[path].mT @ leaf
    if path in right:
      leaf = leaf @ right[path].mT
    return leaf

  return jax.tree_util.tree_map_with_path(reduce, grads)


def _bases(field, axis) -> dict[str, jax.Array]:
  packed = isinstance(field, PackedBases)
  trees = [jax.tree_util.tree_leaves_with_path(tree) for tree in (field if packed else (field,))]
  return {
    path_string(named[0][0]): unpack(tuple(x for _, x in named), axis) for named in zip(*trees)
  }


def _find(state) -> list[ProjectState]:
  found = [x for x in jax.tree.leaves(state, is_leaf=_is_project) if _is_project(x)]
  if not found:
    raise ValueError('this state has no subspace: its transform is not made with `project`')
  return found


def _is_project(x):
  return isinstance(x, ProjectState)
