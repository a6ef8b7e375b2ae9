"""Random matrices that are drawn again wherever they are used."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from memjax.weights.weight import dot, take


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('key',), meta_fields=('shape', 'std')
)
@dataclasses.dataclass(frozen=True)
class Drawn:
  """A matrix `[m, n]` of independent normal numbers, of which the key alone is kept.

  Costs a draw of the matrix at each use, in f32, and the matrix while it is used.

  Attributes:
    key: Raw PRNG key `u32[..., k]`, see `jax.random.key_data`; with the axis of layers if stacked.
    shape: `(m, n)`.
    std: Standard deviation.
  """

  key: jax.Array
  shape: tuple[int, int]
  std: float

  TRAINED: ClassVar = ()

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w[m, n]`, or `x[..., n] @ w^T`, in `x.dtype`."""
    return dot(x, self.materialize(), transpose)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the matrix, which is drawn whole."""
    return take(self.materialize(), ids)

  def materialize(self) -> jax.Array:
    """Returns the matrix `f32[..., m, n]`."""
    *batch, width = self.key.shape
    keys = jax.random.wrap_key_data(self.key.reshape(-1, width))
    draw = lambda key: jax.random.normal(key, self.shape, jnp.float32)
    return self.std * jax.vmap(draw)(keys).reshape(*batch, *self.shape)

  def spread(self, entries: tuple) -> 'Drawn':
    """See `memjax.sharding.weight_shardings`."""
    return dataclasses.replace(self, key=(*entries[:-2], None))


def raw_key(key: jax.Array) -> jax.Array:
  """Returns the numbers of a PRNG key, `u32[k]`, whether it is a typed key or already raw."""
  return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
