"""Fira: GaLore, and the rest of the gradient scaled as GaLore scaled its part."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from memjax.transforms.bases import Basis
from memjax.transforms.lifts import residual
from memjax.transforms.limiter import limit_norm_growth
from memjax.transforms.project import project
from memjax.transforms.targets import Rank, Targets, default_targets


def scale_by_fira(
  rank: Rank,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  side: Literal['short', 'long', 'left', 'right'] = 'short',
  refresh_every: int = 200,
  basis: Basis | None = None,
  scale: float = 0.25,
  growth: float = 1.01,
  removed: float = 1.0,
  moments: Literal['keep', 'rotate'] = 'keep',
  stagger: bool = True,
  targets: Targets = None,
  layout: Callable[[str, jax.Array], jax.Array] | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Rescales updates by Adam in a rank-`r` subspace, and what the subspace leaves out alike.

  For a matrix whose gradient is `G` and whose basis is `P`, with :math:`R = P^T G` and
  :math:`U = \mathrm{Adam}(R)`, the update is

  .. math::
    \mathrm{scale} \cdot P U + L(\phi (G - P R)), \quad \phi_j = \|U_j\| / \|R_j\|

  for every channel `j`, a column if `m` is projected; `L` lets the norm of the second part grow by
  at most 1 % from one update to the next. All other leaves get plain Adam. A matrix keeps `r (a + 2
  c) + 1` f32 numbers, `a` its shorter and `c` its longer side. Sharded, an update communicates `R`
  and norms, never an `[m, n]` matrix; it holds one residual `[..., m, n]` a leaf.

  Args:
    rank: Subspace dimension `r`, or a function of (path, leaf).
    b1: Decay rate of the first moment.
    b2: Decay rate of the second moment.
    eps: Added to the root of the second moment, after bias correction.
    side: Which axis is projected; see `project`.
    refresh_every: Updates (not micro-batches) between two bases of a matrix.
    basis: How bases are found; `subspace_iteration()` if None, `svd()` as published.
    scale: Factor on the part within the subspace.
    growth: Largest ratio of the norms of successive second parts; see `limit_norm_growth`.
    removed: Share of `P R` that the second part lacks: 1 leaves the complement of the subspace. The
      official code removes `scale` of it, so that `1 - scale` of the gradient within the subspace
      counts once more.
    moments: `'keep'` as published, or `'rotate'`; see `project`.
    stagger: False refreshes all bases in the same update, as published.
    targets: `default_targets` if None; see `project`.
    layout: Imposes a sharding on projected leaves; see `project`.
    seed: Seed of the noise that `subspace_iteration` starts from.

  Returns:
    A transform with state `ProjectState`.

  Raises:
    ValueError: as `project`; for a basis that is drawn anew, which has no complement.

  References:
    Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?
    <https://arxiv.org/abs/2410.01623>`_, 2024
  """
  return project(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    rank,
    side=side,
    refresh_every=refresh_every,
    basis=basis,
    scale=scale,
    moments=moments,
    stagger=stagger,
    targets=default_targets if targets is None else targets,
    layout=layout,
    lift=residual(limit_norm_growth(growth), removed),
    seed=seed,
  )


def fira(
  learning_rate: optax.ScalarOrSchedule,
  rank: Rank,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  side: Literal['short', 'long', 'left', 'right'] = 'short',
  refresh_every: int = 200,
  basis: Basis | None = None,
  scale: float = 0.25,
  growth: float = 1.01,
  removed: float = 1.0,
  moments: Literal['keep', 'rotate'] = 'keep',
  stagger: bool = True,
  targets: Targets = None,
  layout: Callable[[str, jax.Array], jax.Array] | None = None,
  seed: int = 0,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Fira with decoupled weight decay: `scale_by_fira`, decay, learning rate.

  Args:
    learning_rate: A number or an optax schedule. Published: 0.01 with `scale=0.25`.
    rank: As `scale_by_fira`, as are all the others but the last two.
    b1: Decay rate of the first moment.
    b2: Decay rate of the second moment.
    eps: Added to the root of the second moment.
    side: Which axis is projected.
    refresh_every: Updates between two bases of a matrix.
    basis: How bases are found.
    scale: Factor on the part within the subspace.
    growth: Largest ratio of the norms of successive second parts.
    removed: Share of `P R` that the second part lacks.
    moments: `'keep'` or `'rotate'`.
    stagger: False refreshes all bases in the same update.
    targets: Leaves to project.
    layout: Imposes a sharding on projected leaves.
    seed: Seed of the noise that `subspace_iteration` starts from.
    weight_decay: Decoupled decay, times the learning rate and not times `scale`.
    mask: Leaves to decay, as in `optax.adamw`.

  Returns:
    A transform that yields updates to be added to the parameters.

  Raises:
    ValueError: as `scale_by_fira`.
  """
  return optax.chain(
    scale_by_fira(
      rank,
      b1=b1,
      b2=b2,
      eps=eps,
      side=side,
      refresh_every=refresh_every,
      basis=basis,
      scale=scale,
      growth=growth,
      removed=removed,
      moments=moments,
      stagger=stagger,
      targets=targets,
      layout=layout,
      seed=seed,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
