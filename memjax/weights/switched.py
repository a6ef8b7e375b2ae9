"""Low-rank-adapted weights whose factors exchange vectors with a pool.

Shapes in this file: as in `memjax.weights.adapted`; a pool holds `c` candidates for the columns of
`A[m, r]` and as many for the rows of `B[r, n]`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from memjax.weights.adapted import Adapted, Restarted
from memjax.weights.weight import is_weight


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=(
    *('base', 'a', 'b', 'key', 'pool_a', 'pool_b', 'chosen_a', 'chosen_b'),
    *('frozen_a', 'frozen_b', 'next_slots'),
  ),
  meta_fields=('scale', 'dropout', 'form'),
)
@dataclasses.dataclass(frozen=True)
class Switched(Restarted):
  """`W + s A B`, where vectors of A and B come from pools, and some are frozen for a while.

  A frozen vector takes part in the product and gets no gradient.

  Attributes:
    pool_a: `[..., c, m]`, or None where candidates are drawn when they are needed.
    pool_b: `[..., c, n]`, or None.
    chosen_a: `i32[..., r]`, which candidate each column of A is.
    chosen_b: `i32[..., r]`, which each row of B is.
    frozen_a: `i32[..., r]`, updates for which columns of A still stay as they are.
    frozen_b: `i32[..., r]`, the same of rows of B.
    next_slots: `i32[..., 2]`, the next column of A and row of B to be exchanged.
  """

  pool_a: jax.Array | None = None
  pool_b: jax.Array | None = None
  chosen_a: jax.Array | None = None
  chosen_b: jax.Array | None = None
  frozen_a: jax.Array | None = None
  frozen_b: jax.Array | None = None
  next_slots: jax.Array | None = None

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ (W + s A B)[m, n]`, or with the transpose, in `x.dtype`."""
    return Adapted.dot(self._held(), x, transpose)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the sum."""
    return Adapted.take(self._held(), ids)

  def materialize(self) -> jax.Array:
    """Returns the sum `[..., m, n]`, formed in f32, in the dtype of W."""
    return Adapted.materialize(self._held())

  def spread(self, entries: tuple) -> 'Switched':
    """See `memjax.sharding.weight_shardings`."""
    *batch, m, n = entries
    whole = (*batch, None)
    return dataclasses.replace(
      super().spread(entries),
      pool_a=None if self.pool_a is None else (*batch, None, m),
      pool_b=None if self.pool_b is None else (*batch, None, n),
      chosen_a=whole,
      chosen_b=whole,
      frozen_a=whole,
      frozen_b=whole,
      next_slots=whole,
    )

  def _held(self):
    """The leaf, its frozen vectors without a derivative."""
    if is_weight(self.a) or is_weight(self.b):  # Perturbed ones have none anyway.
      return self
    a = _hold(self.a, self.frozen_a[..., None, :])
    return dataclasses.replace(self, a=a, b=_hold(self.b, self.frozen_b[..., :, None]))


def _hold(x, frozen):
  return jnp.where(frozen > 0, jax.lax.stop_gradient(x), x)
