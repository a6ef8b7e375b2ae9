"""Low-rank projection of gradients.

Shapes in this file: a matrix leaf is `[..., m, n]`; leading axes are batch (scan-stacked layers,
experts) and each of their matrices, a unit, gets its own basis. `r` is the rank. Every array of the
state keeps its parameter's axes in place, one of the last two replaced by `r`, so that the
parameter's sharding is the state's.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax.transforms import explicit
from memjax.transforms import moments as moments_lib
from memjax.transforms.bases import PRECISION, Basis, subspace_iteration
from memjax.transforms.paths import fold_in_path
from memjax.transforms.targets import SIDES, Plan, Rank, Targets, check_rank, plan_leaves


class ProjectState(NamedTuple):
  """State of `project`; a leaf without a basis on a side has `optax.MaskedNode()` there."""

  count: jax.Array  # i32[], updates seen so far.
  left: optax.Updates  # [..., m, r] f32, orthonormal columns.
  right: optax.Updates  # [..., r, n] f32, orthonormal rows.
  inner: optax.OptState  # Of the inner transform, on [..., r, n], [..., m, r] or [..., r, r].


def project(
  inner: optax.GradientTransformation,
  rank: Rank,
  *,
  side: Literal['short', 'long', 'left', 'right', 'both'] = 'short',
  refresh_every: int = 200,
  basis: Basis | None = None,
  scale: float = 1.0,
  moments: Literal['keep', 'rotate'] = 'keep',
  stagger: bool = True,
  targets: Targets = None,
  layout: Callable[[str, jax.Array], jax.Array] | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Runs `inner` on gradients projected to a rank-`r` subspace.

  With a basis `P` of the gradient's column space, `inner` sees :math:`R = P^T G` and its answer
  `U` becomes the update `scale * P U`. The basis follows the gradient: each unit gets a new one
  every `refresh_every` updates, from the gradient of that very update. Leaves that are not
  projected go through the same `inner` whole.

  Under Adam a matrix keeps `r (a + 2 c)` f32 numbers, `a` its shorter and `c` its longer side,
  against `2 a c`; for `side='both'`, `r (m + n + 2 r)`. Arithmetic is f32 whatever the leaf's dtype
  (f64 for f64), its products at `jax_default_matmul_precision`. An update costs two products, `4 m
  n r` flops; a refresh with `subspace_iteration` four such products and the orthonormalisation of
  `[m, r]`. Sharded over m or n, an update communicates `R`, never an `[m, n]` matrix.

  All units are numbered through; with `stagger` unit `u` of `N` refreshes when `count %
  refresh_every == u * refresh_every // N`, so that an update refreshes `ceil(N / refresh_every)`
  units at most and none is slower than the others. The first update refreshes all.

  Example:
    >>> import jax.numpy as jnp
    >>> optimizer = project(optax.scale_by_adam(), rank=2)
    >>> state = optimizer.init({'w': jnp.zeros([8, 4, 6])})
    >>> state.left['w'].shape, state.inner.mu['w'].shape
    ((8, 4, 2), (8, 2, 6))

  Args:
    inner: Transform to run in the subspace. It gets `params=None`, since their shapes differ there;
      extra arguments are passed on.
    rank: Subspace dimension `r`, or a function of (path, leaf). A leaf whose shorter side is less
      than `r` has no subspace and goes through `inner` whole.
    side: Which axis is projected: `'short'` the shorter (m if equal), `'long'` the other one,
      `'left'` m, `'right'` n, `'both'` both.
    refresh_every: Updates (not micro-batches) between two bases of a unit.
    basis: How bases are found; `subspace_iteration()` if None. A gradient with a NaN or an infinity
      leaves the basis as it was.
    scale: Factor on the updates of projected leaves only.
    moments: What happens to `inner`'s moments when a basis changes: `'keep'` carries the numbers
      over as they are, as published; `'rotate'` expresses them in the new basis `P'`, first moments
      by :math:`C = P'^T P`, second moments by the squares of its entries.
    stagger: False refreshes all units in the same update, as published.
    targets: Leaves to project: None for every leaf with two axes or more, a regular expression
      searched in paths such as `'blocks/attn/q/kernel'`, or a function of (path, leaf).
    layout: Function of (path, projected leaf) that returns the leaf with a sharding imposed on it,
      such as `memjax.sharding.layout(...)`; None leaves it to the compiler, which on a mesh may
      gather `inner`'s moments where it need only gather its answer.
    seed: Seed of the noise that `subspace_iteration` starts from.

  Returns:
    A transform with state `ProjectState`. A kernel that splits its heads, `[D, heads, head_dim]`,
    must be reshaped or left out: only the last two axes count as the matrix.

  Raises:
    ValueError: here for an argument out of range; at `init` if `targets` matches nothing, if no
      leaf has a subspace of rank `r` (naming one and its shape), or if `moments='rotate'` meets
      state it cannot rotate.

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024
  """
  _check(rank, side, refresh_every, basis, moments)
  basis = subspace_iteration() if basis is None else basis
  inner = optax.with_extra_args_support(inner)

  def impose(plan, leaf):
    return leaf if layout is None or not plan.projected else layout(plan.path, leaf)

  def init(params):
    plans = plan_leaves(params, rank, side, targets)
    leaves, treedef = jax.tree.flatten(params)
    projected = treedef.unflatten(map(_projected_zeros, plans, leaves))
    inner_state = inner.init(projected)
    if moments == 'rotate':
      moments_lib.check(inner_state, projected, plans)
    return ProjectState(
      count=jnp.zeros([], jnp.int32),
      left=treedef.unflatten(map(_first_left, plans, leaves)),
      right=treedef.unflatten(map(_first_right, plans, leaves)),
      inner=inner_state,
    )

  def update(updates, state, params=None, **extra_args):
    del params
    return explicit.on_auto_axes(step, (updates, state), updates, state, extra_args)

  def step(updates, state, extra_args):
    plans = plan_leaves(updates, rank, side, targets)
    gradients, treedef = jax.tree.flatten(updates)
    left, right = treedef.flatten_up_to(state.left), treedef.flatten_up_to(state.right)
    inner_leaves, inner_treedef = jax.tree.flatten(state.inner)
    owned = [{} for _ in plans]
    if moments == 'rotate':
      owned = moments_lib.of_leaves(state.inner, updates, plans)

    total = sum(plan.units for plan in plans)
    key = jax.random.fold_in(jax.random.key(seed), state.count)
    for i, plan in enumerate(plans):
      if plan.projected:
        low, high = _due(plan, total, state.count, refresh_every, stagger)
        held = {index: inner_leaves[index] for index in owned[i]}
        left[i], right[i], held = _refresh(
          plan, gradients[i], left[i], right[i], held, owned[i], low, high, key, basis
        )
        for index, moment in held.items():
          inner_leaves[index] = moment

    projected = treedef.unflatten(
      impose(plan, _project(plan, g, p, q)) for plan, g, p, q in zip(plans, gradients, left, right)
    )
    outputs, inner_state = inner.update(
      projected, inner_treedef.unflatten(inner_leaves), None, **extra_args
    )
    outputs = [
      (scale * _back(impose(plan, u), p, q) if plan.projected else u).astype(g.dtype)
      for plan, g, u, p, q in zip(plans, gradients, treedef.flatten_up_to(outputs), left, right)
    ]
    return treedef.unflatten(outputs), ProjectState(
      count=optax.safe_increment(state.count),
      left=treedef.unflatten(left),
      right=treedef.unflatten(right),
      inner=inner_state,
    )

  return optax.GradientTransformationExtraArgs(init, update)


def _check(rank, side, refresh_every, basis, moments):
  check_rank(rank)
  if side not in SIDES:
    raise ValueError(f'side must be one of {", ".join(SIDES)}; got {side!r}')
  # An array is what optax.inject_hyperparams makes of the number; its value is not known here.
  if not isinstance(refresh_every, jax.Array) and (
    refresh_every != int(refresh_every) or refresh_every < 1
  ):
    raise ValueError(f'refresh_every counts updates and must be at least 1, got {refresh_every!r}')
  if basis is not None and not isinstance(basis, Basis):
    raise ValueError(
      f'basis must be a Basis, for instance subspace_iteration() or svd(); got {basis!r}'
    )
  if moments not in ('keep', 'rotate'):
    raise ValueError(f"moments must be 'keep' or 'rotate', got {moments!r}")


def _dtype(leaf):
  return jnp.promote_types(leaf.dtype, jnp.float32)


def _projected_zeros(plan: Plan, leaf):
  """What `inner` sees of a leaf at init: zeros of the projected shape, or of the leaf's own."""
  if not plan.projected:
    return jnp.zeros_like(leaf, dtype=_dtype(leaf))
  *batch, m, n = leaf.shape
  shape = (*batch, plan.rank if plan.left else m, plan.rank if plan.right else n)
  return explicit.lay_out_like(jnp.zeros(shape, _dtype(leaf)), leaf)


def _first_left(plan: Plan, leaf):
  return _identity(leaf, leaf.shape[-2], plan.rank) if plan.left else optax.MaskedNode()


def _first_right(plan: Plan, leaf):
  return _identity(leaf, plan.rank, leaf.shape[-1]) if plan.right else optax.MaskedNode()


def _identity(leaf, rows, columns):
  # Finite and orthonormal, and `subspace_iteration` knows by it that it starts cold.
  identity = jnp.eye(rows, columns, dtype=_dtype(leaf))
  identity = jnp.broadcast_to(identity, (*leaf.shape[:-2], rows, columns))
  return explicit.lay_out_like(identity, leaf)


def _due(plan: Plan, total: int, count, refresh_every, stagger: bool):
  """The leaf's units that refresh in this update: `[low, high)`, empty as a rule.

  Units in slot `s` are those with `s * total / refresh_every <= u < (s + 1) * total /
  refresh_every`, a contiguous range in every leaf.
  """
  slot = count % refresh_every
  if stagger:
    start = -(-slot * total // refresh_every) - plan.first
    stop = -(-(slot + 1) * total // refresh_every) - plan.first
    start, stop = jnp.where(count == 0, 0, start), jnp.where(count == 0, plan.units, stop)
  else:
    start, stop = 0, jnp.where(slot == 0, plan.units, 0)
  return jnp.clip(start, 0, plan.units), jnp.clip(stop, 0, plan.units)


def _refresh(plan, gradient, left, right, held, kinds, low, high, key, basis):
  """Gives the units `[low, high)` of one leaf new bases, one matrix at a time.

  A loop with bounds known at run time only: no trip, no cost. A `cond` would carry both versions of
  the stacked bases, and a `vmap` would turn it into a `select` that refreshes every layer always.

  Args:
    plan: The leaf's plan.
    gradient: `[..., m, n]`.
    left: `[..., m, r]` or a MaskedNode.
    right: `[..., r, n]` or a MaskedNode.
    held: The inner state's moments of this leaf, by any key.
    kinds: For each of those keys `'linear'` or `'square'`.
    low: i32[], first unit.
    high: i32[], unit after the last.
    key: Noise key of this update.
    basis: How to find a basis.

  Returns:
    `left`, `right` and `held`, refreshed.
  """
  units = lambda x: x.reshape(plan.units, *x.shape[-2:])
  stacked = units(gradient)

  def body(unit, carry):
    left, right, held = carry
    matrix = stacked[unit].astype(_dtype(gradient))
    noise = jax.random.fold_in(fold_in_path(key, plan.path), unit)
    turn_left = turn_right = None
    if plan.left:
      old = left[unit]
      new = _finite_or(basis.refresh(matrix, old, noise), old)
      left, turn_left = left.at[unit].set(new), _dot(new.T, old)
    if plan.right:
      old = right[unit].T
      new = _finite_or(basis.refresh(matrix.T, old, noise), old)
      right, turn_right = right.at[unit].set(new.T), _dot(new.T, old)
    held = {
      k: x.at[unit].set(moments_lib.rotate(x[unit], kinds[k], turn_left, turn_right))
      for k, x in held.items()
    }
    return left, right, held

  carry = left, right, held
  refreshed = lax.fori_loop(low, high, body, jax.tree.map(units, carry))
  return jax.tree.map(lambda new, old: new.reshape(old.shape), refreshed, carry)


def _finite_or(new, old):
  return jnp.where(jnp.all(jnp.isfinite(new)), new, old)


def _project(plan: Plan, gradient, left, right):
  """`[..., m, n]` to `[..., r, n]`, `[..., m, r]` or `[..., r, r]`."""
  gradient = gradient.astype(_dtype(gradient))
  if plan.left:
    gradient = left.mT @ gradient
  if plan.right:
    gradient = gradient @ right.mT
  return gradient


def _back(update, left: Any, right: Any):
  """Undoes `_project`, within the subspace."""
  if not isinstance(left, optax.MaskedNode):
    update = left @ update
  if not isinstance(right, optax.MaskedNode):
    update = update @ right
  return update


def _dot(x, y):
  return jnp.matmul(x, y, precision=PRECISION)
