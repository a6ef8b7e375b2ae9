"""GaLore: Adam in the leading singular subspace of the gradient."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from memjax.transforms.bases import Basis
from memjax.transforms.project import project
from memjax.transforms.targets import Rank, Targets, default_targets


def scale_by_galore(
  rank: Rank,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  side: Literal['short', 'long', 'left', 'right', 'both'] = 'short',
  refresh_every: int = 200,
  basis: Basis | None = None,
  scale: float = 0.25,
  moments: Literal['keep', 'rotate'] = 'keep',
  stagger: bool = True,
  targets: Targets = None,
  layout: Callable[[str, jax.Array], jax.Array] | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Rescales updates by Adam, in a rank-`r` subspace for the layers' matrices.

  For a matrix whose gradient is `G` and whose basis is `P`, :math:`R = P^T G`, the update is
  :math:`\mathrm{scale} \cdot P \, \mathrm{Adam}(R)`. All other leaves get plain Adam. A matrix
  keeps `r (a + 2 c)` f32 numbers, `a` its shorter and `c` its longer side, where Adam keeps
  `2 a c`.

  Args:
    rank: Subspace dimension `r`, or a function of (path, leaf).
    b1: Decay rate of the first moment.
    b2: Decay rate of the second moment.
    eps: Added to the root of the second moment, after bias correction.
    side: Which axis is projected; see `project`.
    refresh_every: Updates (not micro-batches) between two bases of a matrix.
    basis: How bases are found; `subspace_iteration()` if None, `svd()` as published.
    scale: Factor on the updates of projected leaves; Adam's output has no scale of its own, so that
      with 0.25 their learning rate is a quarter of the other leaves'.
    moments: `'keep'` as published, or `'rotate'`; see `project`.
    stagger: False refreshes all bases in the same update, as published.
    targets: `default_targets` if None; see `project`.
    layout: Imposes a sharding on projected leaves; see `project`.
    seed: Seed of the noise that `subspace_iteration` starts from.

  Returns:
    A transform with state `ProjectState`.

  Raises:
    ValueError: as `project`.

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024
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
    seed=seed,
  )


def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: Rank,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  side: Literal['short', 'long', 'left', 'right', 'both'] = 'short',
  refresh_every: int = 200,
  basis: Basis | None = None,
  scale: float = 0.25,
  moments: Literal['keep', 'rotate'] = 'keep',
  stagger: bool = True,
  targets: Targets = None,
  layout: Callable[[str, jax.Array], jax.Array] | None = None,
  seed: int = 0,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """GaLore with decoupled weight decay: `scale_by_galore`, decay, learning rate.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> optimizer = galore(learning_rate=0.01, rank=4, scale=1.0)
    >>> loss = lambda params: jnp.mean(jnp.square(params['w']))
    >>> params = {'w': jnp.ones([16, 24]), 'bias': jnp.zeros([24])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(f'{loss(params):.3f}')
    0.995
    0.990
    0.985

  Args:
    learning_rate: A number or an optax schedule. Published: 0.01 with `scale=0.25`.
    rank: Subspace dimension `r`; published, a quarter of the model's width.
    b1: As `scale_by_galore`.
    b2: As `scale_by_galore`.
    eps: As `scale_by_galore`.
    side: As `scale_by_galore`.
    refresh_every: As `scale_by_galore`.
    basis: As `scale_by_galore`.
    scale: As `scale_by_galore`.
    moments: As `scale_by_galore`.
    stagger: As `scale_by_galore`.
    targets: As `scale_by_galore`.
    layout: As `scale_by_galore`.
    seed: As `scale_by_galore`.
    weight_decay: Decoupled decay, times the learning rate and not times `scale`.
    mask: Leaves to decay, as in `optax.adamw`.

  Returns:
    A transform that yields updates to be added to the parameters.

  Raises:
    ValueError: as `project`.
  """
  return optax.chain(
    scale_by_galore(
      rank,
      b1=b1,
      b2=b2,
      eps=eps,
      side=side,
      refresh_every=refresh_every,
      basis=basis,
      scale=scale,
      moments=moments,
      stagger=stagger,
      targets=targets,
      layout=layout,
      seed=seed,
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
