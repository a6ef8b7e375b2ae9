"""GaLore-Adafactor: Adafactor in the leading singular subspace of the gradient."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from memjax.transforms.adafactor import scale_by_adafactor
from memjax.transforms.bases import Basis
from memjax.transforms.project import project
from memjax.transforms.targets import Rank, Targets, default_targets


def scale_by_galore_adafactor(
  rank: Rank,
  *,
  decay_rate: float = 0.8,
  min_dim_size_to_factor: int = 1,
  clipping_threshold: float | None = 1.0,
  momentum: float | None = None,
  eps: float = 1e-30,
  side: Literal['short', 'long', 'left', 'right', 'both'] = 'short',
  refresh_every: int = 200,
  basis: Basis | None = None,
  scale: float = 0.25,
  stagger: bool = True,
  targets: Targets = None,
  layout: Callable[[str, jax.Array], jax.Array] | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Adafactor without parameter scale, in a rank-`r` subspace for the layers' matrices.

  A matrix keeps `r a + r + c` f32 numbers, `a` its shorter and `c` its longer side: its basis, and
  the rows and columns of its projected gradient; `r c` more with momentum. Other leaves get plain
  Adafactor.

  Args:
    rank: Subspace dimension `r`, or a function of (path, leaf).
    decay_rate: As `scale_by_adafactor`.
    min_dim_size_to_factor: As `scale_by_adafactor`, of the projected gradient.
    clipping_threshold: Largest RMS of a unit's projected update.
    momentum: Decay of an average of the projected updates; None has none.
    eps: As `scale_by_adafactor`.
    side: As `project`.
    refresh_every: As `project`.
    basis: As `project`.
    scale: Factor on the updates of projected leaves.
    stagger: As `project`.
    targets: `default_targets` if None; see `project`.
    layout: As `project`.
    seed: As `project`.

  Returns:
    A transform with state `ProjectState`.

  Raises:
    ValueError: as `project`.

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
    <https://arxiv.org/abs/2403.03507>`_, 2024
  """
  inner = scale_by_adafactor(
    decay_rate=decay_rate,
    min_dim_size_to_factor=min_dim_size_to_factor,
    clipping_threshold=clipping_threshold,
    eps=eps,
  )
  if momentum is not None:
    inner = optax.chain(inner, optax.ema(momentum, debias=False))
  return project(
    inner,
    rank,
    side=side,
    refresh_every=refresh_every,
    basis=basis,
    scale=scale,
    stagger=stagger,
    targets=default_targets if targets is None else targets,
    layout=layout,
    seed=seed,
  )


def galore_adafactor(
  learning_rate: optax.ScalarOrSchedule,
  rank: Rank,
  *,
  weight_decay: float = 0.0,
  mask: Any = None,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GaLore with Adafactor and decoupled weight decay.

  Example:
    >>> import jax.numpy as jnp
    >>> optimizer = galore_adafactor(learning_rate=0.01, rank=4, scale=1.0)
    >>> loss = lambda params: jnp.mean(jnp.square(params['w']))
    >>> params = {'w': jnp.ones([16, 24]), 'bias': jnp.zeros([24])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(f'{loss(params):.3f}')
    0.995
    0.991
    0.986

  Args:
    learning_rate: A number or an optax schedule.
    rank: As `scale_by_galore_adafactor`.
    weight_decay: Decoupled decay, times the learning rate and not times `scale`.
    mask: Leaves to decay, as in `optax.adamw`.
    **options: As `scale_by_galore_adafactor`.

  Returns:
    A transform that yields updates to be added to the parameters.

  Raises:
    ValueError: as `scale_by_galore_adafactor`.
  """
  return optax.chain(
    scale_by_galore_adafactor(rank, **options),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
