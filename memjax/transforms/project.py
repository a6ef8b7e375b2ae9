"""Low-rank projection of gradients.

Shapes in this file: a matrix leaf is `[..., m, n]`; leading axes are batch (scan-stacked layers,
experts) and each of their matrices, a unit, gets its own basis. `r` is the rank. Every array of the
state keeps its parameter's axes in place, one of the last two replaced by `r`, so that the
parameter's sharding is the state's.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms import explicit, intervals, lifts
from memjax.transforms import moments as moments_lib
from memjax.transforms import storage as storage_lib
from memjax.transforms.bases import Address, Basis, subspace_iteration
from memjax.transforms.float32 import Float32
from memjax.transforms.intervals import Clock, Interval
from memjax.transforms.layers import Layer
from memjax.transforms.lifts import Lift
from memjax.transforms.refresh import Held, Ways, refresh
from memjax.transforms.storage import Storage
from memjax.transforms.targets import (
  SIDES,
  Plan,
  Rank,
  Targets,
  check_rank,
  first_in_leaf,
  plan_leaves,
)
from memjax.transforms.units import at_least_float32


class ProjectState(NamedTuple):
  """State of `project`; a leaf without a basis on a side has `optax.MaskedNode()` there."""

  count: jax.Array  # i32[], updates seen so far.
  left: Any  # [..., m, r] f32, orthonormal columns; or what `storage` makes of them.
  right: Any  # [..., r, n] f32, orthonormal rows; likewise.
  inner: optax.OptState  # Of the inner transform, on [..., r, n], [..., m, r] or [..., r, r].
  outside: optax.OptState  # Of the lift's transform, on the [..., m, n] of projected leaves.
  interval: Any  # Of `interval`, [...] or [..., k] per leaf; empty for fixed ones.


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
  lift: Lift | None = None,
  storage: Storage | None = None,
  interval: Interval | None = None,
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
    layout: Function of (path, leaf) that returns a projected leaf, or a basis that is drawn, with a
      sharding imposed on it, such as `memjax.sharding.layout(...)`; None leaves it to the compiler,
      which on a mesh may gather `inner`'s moments where it need only gather its answer, and the
      gradient where it need only add up products with a drawn basis. A `memjax.sharding.Layout`
      keeps a refresh, too, from gathering the gradient where bases are sharded over the rank.
    lift: How the answer of `inner` becomes an update of the whole matrix; `lifts.back()` if None,
      as above.
    storage: How bases are kept; `storage.whole()`, f32, if None, `packed()` for 8 or 4 bits. Bases
      that are drawn, as by `random_projection()`, are not kept at all.
    interval: Whether `refresh_every` stays as it is, `fixed()` if None, or grows for matrices whose
      subspace has come to rest, `lazy()`.
    seed: Seed of the noise of bases.

  Returns:
    A transform with state `ProjectState`. Its `update` takes three extra arguments, for steps that
    do not hold the whole gradient of an update at once: `layer`, see `Layer`, and `projected` and
    `only_refresh`, see `refresh_subspace`. A kernel that splits its heads, `[D, heads, head_dim]`,
    must be reshaped or left out: only the last two axes count as the matrix.

  Raises:
    ValueError: here for arguments out of range or at odds with each other; at `init` if `targets`
      matches nothing, if no leaf has a subspace of rank `r` (naming one and its shape), or if
      `moments='rotate'` meets state it cannot rotate.

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024
  """
  basis = subspace_iteration() if basis is None else basis
  lift = lifts.back() if lift is None else lift
  ways = Ways(
    basis,
    storage_lib.whole() if storage is None else storage,
    intervals.fixed() if interval is None else interval,
  )
  _check(rank, side, refresh_every, moments, lift, ways)
  inner = optax.with_extra_args_support(inner)
  widens = isinstance(inner, Float32)
  by_rows = hasattr(layout, 'along')

  def impose(plan, leaf):
    return leaf if layout is None or not plan.projected else layout(plan.path, leaf)

  def basis_of(clock, parts, gradient, axis):
    found = _basis(clock, parts, gradient, basis, seed, axis)
    if found is None or basis.draw is None:
      return found
    # A basis that is drawn lies on every device, and the compiler would gather the gradient to it.
    return impose(clock.plan, found)

  def init(params):
    plans = plan_leaves(params, rank, side, targets)
    leaves, treedef = jax.tree.flatten(params)
    projected = treedef.unflatten(map(_projected_zeros, plans, leaves))
    inner_state = inner.init(projected)
    if moments == 'rotate':
      moments_lib.check(inner_state, projected, plans)
    starts = [_start(plan, leaf, ways, refresh_every) for plan, leaf in zip(plans, leaves)]
    state = ProjectState(
      count=jnp.zeros([], jnp.int32),
      left=None,
      right=None,
      inner=inner_state,
      outside=optax.EmptyState(),
      interval=None,
    )
    if lift.outside is not None:
      state = state._replace(outside=lift.outside.init(_only_projected(plans, leaves, treedef)))
    return _keep(state, starts, treedef, ways)

  def update(
    updates,
    state,
    params=None,
    *,
    projected: bool = False,
    only_refresh=None,
    layer: Layer | None = None,
    **extra_args,
  ):
    if projected:
      _check_projected(params, basis, lift)
    whole = params if projected else updates
    plans = plan_leaves(whole, rank, side, targets, layer)
    firsts = [first_in_leaf(plan, layer) for plan in plans]
    function = functools.partial(step, plans, projected)
    arguments = updates, state, firsts, only_refresh, extra_args
    return explicit.on_auto_axes(function, (whole, state), *arguments)

  def step(plans, projected, updates, state, firsts, only_refresh, extra_args):
    gradients, treedef = jax.tree.flatten(updates)
    clocks = [
      Clock(plan, first, state.count, refresh_every, stagger) for plan, first in zip(plans, firsts)
    ]
    held, inner_state = _held(state, treedef, ways), state.inner
    if not projected and ways.basis.draw is None:
      held, inner_state = renew(clocks, gradients, updates, held, inner_state, only_refresh)
      state = _keep(state._replace(inner=inner_state), held, treedef, ways)
    if only_refresh is not None:
      return updates, state

    left = [basis_of(c, h.left, g, -2) for c, h, g in zip(clocks, held, gradients)]
    right = [basis_of(c, h.right, g, -1) for c, h, g in zip(clocks, held, gradients)]
    reduced = gradients
    if not projected:
      reduced = [
        g if widens and not plan.projected else _project(g, *sides)
        for plan, g, *sides in zip(plans, gradients, left, right)
      ]
    reduced = [impose(plan, leaf) for plan, leaf in zip(plans, reduced)]
    answers, inner_state = inner.update(treedef.unflatten(reduced), inner_state, None, **extra_args)
    answers = treedef.flatten_up_to(answers)

    outputs, withouts, outside = list(answers), [None] * len(plans), state.outside
    for i, plan in enumerate(plans):
      if plan.projected:
        back = lambda x, i=i: _back(impose(plans[i], x), left[i], right[i])
        wide = gradients[i].astype(at_least_float32(gradients[i]))
        arguments = plan, scale, back, wide, reduced[i], answers[i]
        outputs[i], withouts[i] = lift.split(*arguments)
    if lift.outside is not None:
      withouts, outside = lift.outside.update(_only_projected(plans, withouts, treedef), outside)
      for i, without in enumerate(treedef.flatten_up_to(withouts)):
        if plans[i].projected:
          outputs[i] = without if outputs[i] is None else outputs[i] + without
    outputs = [u.astype(g.dtype) for u, g in zip(outputs, gradients)]
    return treedef.unflatten(outputs), state._replace(
      count=optax.safe_increment(state.count), inner=inner_state, outside=outside
    )

  def renew(clocks, gradients, updates, held, inner_state, when):
    """Gives every leaf's due units new bases, and rotates their moments."""
    inner_leaves, inner_treedef = jax.tree.flatten(inner_state)
    owned = [{} for _ in clocks]
    if moments == 'rotate':
      owned = moments_lib.of_leaves(inner_state, updates, [clock.plan for clock in clocks])
    key = jax.random.fold_in(jax.random.key(seed), clocks[0].count) if clocks else None
    for i, clock in enumerate(clocks):
      if clock.plan.projected:
        with_moments = held[i]._replace(moments={k: inner_leaves[k] for k in owned[i]})
        along = functools.partial(layout.along, clock.plan.path) if by_rows else None
        held[i] = refresh(ways, clock, gradients[i], with_moments, owned[i], key, when, along)
        for index, moment in held[i].moments.items():
          inner_leaves[index] = moment
    return held, inner_treedef.unflatten(inner_leaves)

  return optax.GradientTransformationExtraArgs(init, update)


def _check(rank, side, refresh_every, moments, lift, ways):
  check_rank(rank)
  if side not in SIDES:
    raise ValueError(f'side must be one of {", ".join(SIDES)}; got {side!r}')
  # An array is what optax.inject_hyperparams makes of the number; its value is not known here.
  if not isinstance(refresh_every, jax.Array) and (
    refresh_every != int(refresh_every) or refresh_every < 1
  ):
    raise ValueError(f'refresh_every counts updates and must be at least 1, got {refresh_every!r}')
  if moments not in ('keep', 'rotate'):
    raise ValueError(f"moments must be 'keep' or 'rotate', got {moments!r}")
  for name, kind, value in (
    ('basis', Basis, ways.basis),
    ('lift', Lift, lift),
    ('storage', Storage, ways.storage),
    ('interval', Interval, ways.interval),
  ):
    if not isinstance(value, kind):
      example = {'basis': 'svd', 'lift': 'back', 'storage': 'packed', 'interval': 'lazy'}[name]
      raise ValueError(
        f'{name} must be a {kind.__name__}, for instance what {example}() returns; got {value!r}'
      )
  if lift.one_sided and side == 'both':
    raise ValueError(
      "a lift that scales channels takes the projection of one side, not side='both'"
    )
  if ways.basis.draw is not None:
    for name, wrong in (
      ("moments='rotate'", moments == 'rotate'),
      ('a lift that subtracts the projection', lift.orthonormal),
      ('an interval with state', bool(ways.interval.field is not optax.EmptyState)),
    ):
      if wrong:
        raise ValueError(
          f'{name} needs bases that are found and kept; a basis that is drawn anew is neither, nor '
          'is it orthonormal. Use svd() or subspace_iteration()'
        )


def _check_projected(params, basis, lift):
  if lift.reads_gradient:
    raise ValueError(
      'projected=True gives no gradient of full size, which the lift of this transform scales; '
      'accumulate whole gradients instead'
    )
  if basis.draw is not None:
    raise ValueError(
      'projected=True takes gradients projected to bases that the state holds; a basis that is '
      'drawn anew is not among them. Use svd() or subspace_iteration()'
    )
  if params is None:
    raise ValueError('projected=True knows the leaves by their parameters: pass params to update')


def _projected_zeros(plan: Plan, leaf):
  """What `inner` sees of a leaf at init: zeros of the projected shape, or of the leaf's own."""
  if not plan.projected:
    return jnp.zeros_like(leaf, dtype=at_least_float32(leaf))
  *batch, m, n = leaf.shape
  shape = (*batch, plan.rank if plan.left else m, plan.rank if plan.right else n)
  return explicit.lay_out_like(jnp.zeros(shape, at_least_float32(leaf)), leaf)


def _only_projected(plans, leaves, treedef):
  masked = [leaf if plan.projected else optax.MaskedNode() for plan, leaf in zip(plans, leaves)]
  return treedef.unflatten(masked)


def _start(plan: Plan, leaf, ways: Ways, refresh_every) -> Held:
  """State of one leaf before its first bases."""
  if not plan.projected:
    return Held((), (), (), {})
  left = right = ()
  if ways.basis.draw is None:
    *_, m, n = leaf.shape
    left = _identity(leaf, (m, plan.rank), -2, ways) if plan.left else ()
    right = _identity(leaf, (plan.rank, n), -1, ways) if plan.right else ()
  return Held(left, right, ways.interval.init(leaf, plan, refresh_every), {})


def _identity(leaf, shape, axis, ways):
  # Finite and orthonormal, and `subspace_iteration` knows by it that it starts cold.
  identity = jnp.eye(*shape, dtype=at_least_float32(leaf))
  identity = jnp.broadcast_to(identity, (*leaf.shape[:-2], *shape))
  return tuple(explicit.lay_out_like(part, leaf) for part in ways.storage.pack(identity, axis))


def _keep(state: ProjectState, held: list[Held], treedef, ways: Ways) -> ProjectState:
  """Writes every leaf's bases and times into the fields of the state."""
  fields = {name: [getattr(leaf, name) for leaf in held] for name in ('left', 'right', 'interval')}
  collect = lambda name, field: _collect(fields[name], treedef, field)
  return state._replace(
    left=collect('left', ways.storage.field),
    right=collect('right', ways.storage.field),
    interval=collect('interval', ways.interval.field),
  )


def _held(state: ProjectState, treedef, ways: Ways) -> list[Held]:
  """Reads what `_keep` wrote."""
  columns = (
    _distribute(state.left, treedef, ways.storage.field),
    _distribute(state.right, treedef, ways.storage.field),
    _distribute(state.interval, treedef, ways.interval.field),
  )
  return [Held(*parts, {}) for parts in zip(*columns)]


def _collect(rows, treedef, field):
  """One tuple of arrays a leaf to `field` of one tree for each of its arguments."""
  trees = []
  for i in range(_width(field)):
    column = [row[i] if row else optax.MaskedNode() for row in rows]
    trees.append(treedef.unflatten(column))
  return field(*trees)


def _distribute(tree, treedef, field):
  trees = tree if isinstance(tree, tuple) and type(tree) is field else (tree,)
  trees = trees[: _width(field)]
  columns = [treedef.flatten_up_to(each) for each in trees]
  present = lambda parts: tuple(x for x in parts if not isinstance(x, optax.MaskedNode))
  return [present(parts) for parts in zip(*columns)] or [()] * treedef.num_leaves


def _width(field) -> int:
  return len(getattr(field, '_fields', ('tree',)))


def _basis(clock: Clock, parts, gradient, basis: Basis, seed, axis):
  """The basis of one side of a leaf, f32; None if there is none."""
  plan = clock.plan
  if not (plan.projected and (plan.left if axis == -2 else plan.right)):
    return None
  if basis.draw is None:
    return storage_lib.unpack(parts, axis)
  units = clock.first + jnp.arange(plan.units, dtype=jnp.int32)
  address = Address(plan.path, axis, seed, intervals.refreshes_before(clock), units)
  drawn = basis.draw(address, (*gradient.shape[:-2], gradient.shape[axis], plan.rank))
  drawn = drawn.astype(at_least_float32(gradient))
  return drawn if axis == -2 else drawn.mT


def _project(gradient, left, right):
  """`[..., m, n]` to `[..., r, n]`, `[..., m, r]` or `[..., r, r]`; others as they are, in f32."""
  gradient = gradient.astype(at_least_float32(gradient))
  if left is not None:
    gradient = left.mT @ gradient
  if right is not None:
    gradient = gradient @ right.mT
  return gradient


def _back(update, left, right):
  """Undoes `_project`, within the subspace."""
  if left is not None:
    update = left @ update
  if right is not None:
    update = update @ right
  return update
