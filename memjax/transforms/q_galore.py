"""Q-GaLore: GaLore with bases in a few bits, refreshed where the subspace still moves."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from memjax.transforms.bases import Basis
from memjax.transforms.intervals import Interval, lazy
from memjax.transforms.project import project
from memjax.transforms.storage import Storage, packed
from memjax.transforms.targets import Rank, Targets, default_targets


def scale_by_q_galore(
  rank: Rank,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  inner: optax.GradientTransformation | None = None,
  side: Literal['short', 'long', 'left', 'right', 'both'] = 'short',
  refresh_every: int = 200,
  interval: Interval | None = None,
  basis: Basis | None = None,
  storage: Storage | None = None,
  scale: float = 0.25,
  stagger: bool = True,
  targets: Targets = None,
  layout: Callable[[str, jax.Array], jax.Array] | None = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """GaLore with bases in 4 bits, refreshed less and less often once a subspace has come to rest.

  A matrix keeps `a (r / 2 + 4 ceil(r / 128))` bytes of basis, `a` its shorter side, where GaLore
  keeps `4 a r`; 28 bytes of its refresh times; and `inner`'s state, f32 moments of `8 r c` bytes
  unless `inner` keeps them in fewer bits. The published method has 8-bit weights as well.

  Args:
    rank: Subspace dimension `r`, or a function of (path, leaf); even for 4 bits.
    b1: Decay rate of the first moment.
    b2: Decay rate of the second moment; published scripts: 0.95.
    eps: Added to the root of the second moment, after bias correction.
    inner: Transform to run in the subspace; Adam with the three numbers above if None. Published,
      Adam whose moments have 8 bits.
    side: Which axis is projected; see `project`.
    refresh_every: Updates (not micro-batches) between two bases of a matrix, to begin with.
    interval: How that number grows; `lazy()` if None.
    basis: How bases are found; `subspace_iteration()` if None, `svd()` as published.
    storage: How bases are kept; `packed(bits=4)` if None.
    scale: Factor on the updates of projected leaves.
    stagger: False gives all matrices their second basis in the same update, as published.
    targets: `default_targets` if None; see `project`.
    layout: Imposes a sharding on projected leaves; see `project`.
    seed: Seed of the noise that `subspace_iteration` starts from.

  Returns:
    A transform with state `ProjectState`.

  Raises:
    ValueError: as `project`; for an odd rank with 4 bits.

  References:
    Zhang et al., `Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
    Gradients <https://arxiv.org/abs/2407.08296>`_, 2024
  """
  return project(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps) if inner is None else inner,
    rank,
    side=side,
    refresh_every=refresh_every,
    basis=basis,
    scale=scale,
    stagger=stagger,
    targets=default_targets if targets is None else targets,
    layout=layout,
    storage=packed() if storage is None else storage,
    interval=lazy() if interval is None else interval,
    seed=seed,
  )


def q_galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: Rank,
  *,
  weight_decay: float = 0.0,
  mask: Any = None,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """Q-GaLore with decoupled weight decay: `scale_by_q_galore`, decay, learning rate.

  Example:
    >>> import jax.numpy as jnp
    >>> state = q_galore(learning_rate=0.01, rank=4).init({'w': jnp.zeros([16, 24])})
    >>> state[0].left.codes['w'].shape, state[0].left.codes['w'].dtype
    ((16, 2), dtype('uint8'))

  Args:
    learning_rate: A number or an optax schedule. Published: 0.015 with `scale=0.25`.
    rank: As `scale_by_q_galore`.
    weight_decay: Decoupled decay, times the learning rate and not times `scale`.
    mask: Leaves to decay, as in `optax.adamw`.
    **options: As `scale_by_q_galore`.

  Returns:
    A transform that yields updates to be added to the parameters.

  Raises:
    ValueError: as `scale_by_q_galore`.
  """
  return optax.chain(
    scale_by_q_galore(rank, **options),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
