"""GoLore: GaLore first, random subspaces once noise drowns the gradient."""

from typing import Any, Literal

import optax

from memjax.transforms.bases import Basis, random_subspace, subspace_iteration, then
from memjax.transforms.galore import galore, scale_by_galore
from memjax.transforms.targets import Rank


def scale_by_golore(
  rank: Rank,
  random_after: int,
  *,
  basis: Basis | None = None,
  moments: Literal['keep', 'rotate'] = 'rotate',
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GaLore whose bases are uniformly random from update `random_after` on.

  Near a minimum the noise of a small batch outweighs the gradient; the leading singular vectors
  then follow the noise, and the signal may never get into the subspace. A random one holds its
  share of it. Moments are expressed in each new basis. A matrix keeps `r (a + 2 c)` f32 numbers as
  under GaLore, and an update communicates as much; orthonormalising a random `[m, r]` communicates
  `[r, r]` Gram matrices.

  Args:
    rank: Subspace dimension `r`, or a function of (path, leaf).
    random_after: Updates with bases from the gradient; published, four fifths of the run.
    basis: How bases are found until then; `subspace_iteration()` if None, `svd()` as published.
    moments: `'rotate'` as meant; the official code keeps them, and forgets the gradients of the
      updates that refresh.
    **options: As `scale_by_galore`.

  Returns:
    A transform with state `ProjectState`.

  Raises:
    ValueError: as `project`; for a `basis` that is drawn anew and not kept.

  References:
    He et al., `Subspace Optimization for Large Language Models with Convergence Guarantees
    <https://arxiv.org/abs/2410.11289>`_, 2024
  """
  return scale_by_galore(rank, basis=_basis(basis, random_after), moments=moments, **options)


def golore(
  learning_rate: optax.ScalarOrSchedule,
  rank: Rank,
  random_after: int,
  *,
  basis: Basis | None = None,
  moments: Literal['keep', 'rotate'] = 'rotate',
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GoLore with decoupled weight decay: `scale_by_golore`, decay, learning rate.

  Args:
    learning_rate: A number or an optax schedule.
    rank: As `scale_by_golore`.
    random_after: As `scale_by_golore`.
    basis: As `scale_by_golore`.
    moments: As `scale_by_golore`.
    **options: As `galore`.
  """
  basis = _basis(basis, random_after)
  return galore(learning_rate, rank, basis=basis, moments=moments, **options)


def _basis(basis, random_after):
  return then(subspace_iteration() if basis is None else basis, random_after, random_subspace())
