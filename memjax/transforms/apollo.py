"""APOLLO: gradients scaled by what Adam does to a random sketch of them."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from memjax.transforms.bases import Basis, random_projection
from memjax.transforms.lifts import rescale
from memjax.transforms.limiter import limit_norm_growth
from memjax.transforms.project import project
from memjax.transforms.targets import Rank, Targets, default_targets


def scale_by_apollo(
  rank: Rank,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  inner: optax.GradientTransformation | None = None,
  by: Literal['channel', 'tensor'] = 'channel',
  side: Literal['short', 'long', 'left', 'right'] = 'short',
  refresh_every: int = 200,
  basis: Basis | None = None,
  scale: float = 1.0,
  growth: float = 1.01,
  stagger: bool = True,
  targets: Targets = None,
  layout: Callable[[str, jax.Array], jax.Array] | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Scales the channels of a gradient as Adam scales those of a random projection of it.

  For a matrix whose gradient is `G`, with `R` its projection to `r` random directions and
  :math:`U = \mathrm{Adam}(R)`, channel `j` of the update, a column of `G` if `m` is projected, is

  .. math::
    \mathrm{scale} \cdot G_j \, \|U_j\| / \|R_j\|,

  and the norm of the whole update grows by at most 1 % from one update to the next. All other
  leaves get plain Adam. A matrix keeps `2 r c + 1` f32 numbers, `c` its longer side, where Adam
  keeps `2 a c`: the projection is drawn again in every update and not kept (other bases keep `r a`
  more). Sharded, an update communicates `R` and norms, and given `layout` never an `[m, n]` matrix.

  Args:
    rank: Subspace dimension `r`, or a function of (path, leaf); published, a quarter of the model's
      width.
    b1: Decay rate of the first moment.
    b2: Decay rate of the second moment.
    eps: Added to the root of the second moment, after bias correction.
    inner: Transform whose answer sets the factors; Adam with the three numbers above if None.
    by: What shares a factor: a `'channel'`, or the whole matrix, `'tensor'`.
    side: Which axis is projected; see `project`.
    refresh_every: Updates (not micro-batches) between two projections of a matrix.
    basis: `random_projection()` if None; `svd()` and `subspace_iteration()` follow the gradient.
    scale: Factor on the updates of projected leaves. The official argument of that name is its
      square.
    growth: Largest ratio of the norms of a matrix's successive updates; see `limit_norm_growth`.
    stagger: False draws all projections anew in the same update, as published.
    targets: `default_targets` if None; see `project`.
    layout: Imposes a sharding on projected leaves; see `project`.
    seed: Seed of the projections.

  Returns:
    A transform with state `ProjectState`.

  Raises:
    ValueError: as `project`.

  References:
    Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
    <https://arxiv.org/abs/2412.05270>`_, 2024
  """
  return project(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps) if inner is None else inner,
    rank,
    side=side,
    refresh_every=refresh_every,
    basis=random_projection() if basis is None else basis,
    scale=scale,
    stagger=stagger,
    targets=default_targets if targets is None else targets,
    layout=layout,
    lift=rescale(by, limit_norm_growth(growth)),
    seed=seed,
  )


def apollo(
  learning_rate: optax.ScalarOrSchedule,
  rank: Rank,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  inner: optax.GradientTransformation | None = None,
  by: Literal['channel', 'tensor'] = 'channel',
  side: Literal['short', 'long', 'left', 'right'] = 'short',
  refresh_every: int = 200,
  basis: Basis | None = None,
  scale: float = 1.0,
  growth: float = 1.01,
  stagger: bool = True,
  targets: Targets = None,
  layout: Callable[[str, jax.Array], jax.Array] | None = None,
  seed: int = 0,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """APOLLO with decoupled weight decay: `scale_by_apollo`, decay, learning rate.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> optimizer = apollo(learning_rate=0.01, rank=4)
    >>> loss = lambda params: jnp.mean(jnp.square(params['w']))
    >>> params = {'w': jnp.ones([16, 24]), 'bias': jnp.zeros([24])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> state[0].left['w']
    MaskedNode()

  Args:
    learning_rate: A number or an optax schedule. Published: 0.01.
    rank: As `scale_by_apollo`, as are all the others but the last two.
    b1: Decay rate of the first moment.
    b2: Decay rate of the second moment.
    eps: Added to the root of the second moment.
    inner: In place of Adam, such as `quantize_state` of it.
    by: `'channel'` or `'tensor'`.
    side: Which axis is projected.
    refresh_every: Updates between two projections of a matrix.
    basis: `random_projection()` if None.
    scale: Factor on the updates of projected leaves.
    growth: Largest ratio of the norms of successive updates.
    stagger: False draws all projections anew in the same update.
    targets: Leaves to project.
    layout: Imposes a sharding on projected leaves.
    seed: Seed of the projections.
    weight_decay: Decoupled decay, times the learning rate and not times `scale`.
    mask: Leaves to decay, as in `optax.adamw`.

  Returns:
    A transform that yields updates to be added to the parameters.

  Raises:
    ValueError: as `project`.
  """
  return optax.chain(
    scale_by_apollo(
      rank,
      b1=b1,
      b2=b2,
      eps=eps,
      inner=inner,
      by=by,
      side=side,
      refresh_every=refresh_every,
      basis=basis,
      scale=scale,
      growth=growth,
      stagger=stagger,
      targets=targets,
      layout=layout,
      seed=seed,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def scale_by_apollo_mini(
  *, scale: float = 128**0.5, **options: Any
) -> optax.GradientTransformationExtraArgs:
  """APOLLO-Mini: one factor a matrix, from a projection to a single direction.

  A matrix keeps `2 c + 1` f32 numbers, `c` its longer side: hardly more than gradient descent. A
  norm in one direction says little of the whole; the factor comes out small by about the root of
  the shorter side, which `scale` makes up for.

  Args:
    scale: Factor on the updates of projected leaves; the official scripts' 128 is its square.
    **options: As `scale_by_apollo`.

  >>> state = scale_by_apollo_mini().init({'w': jax.numpy.zeros([64, 256])})
  >>> sum(x.size for x in jax.tree.leaves(state) if x.ndim)
  512
  """
  return scale_by_apollo(1, by='tensor', scale=scale, **options)


def apollo_mini(
  learning_rate: optax.ScalarOrSchedule, *, scale: float = 128**0.5, **options: Any
) -> optax.GradientTransformationExtraArgs:
  """APOLLO-Mini with decoupled weight decay: `scale_by_apollo_mini`, decay, learning rate.

  Args:
    learning_rate: A number or an optax schedule. Published: 0.01.
    scale: As `scale_by_apollo_mini`.
    **options: As `apollo`.
  """
  return apollo(learning_rate, 1, by='tensor', scale=scale, **options)
