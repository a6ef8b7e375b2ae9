"""Adapted weights whose base or factors are made of other numbers where they are used.

Shapes in this file: a weight is `[m, n]`, its factors `A[m, r]` and `B[r, n]`; stacked leaves have
an axis of layers in front of all. Each leaf here holds an `Adapted` and says which one it stands
for, so that products, their order and what they keep are written once.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from memjax.weights.adapted import Adapted, Around, dropped
from memjax.weights.dora import column_lengths
from memjax.weights.frozen import spread
from memjax.weights.perturbed import Perturbed
from memjax.weights.weight import Weight, dot, materialize, take


class Variant(Around):
  """What leaves here share; they have a method `resolved`."""

  def resolved(self) -> Adapted:
    """Returns the adapted weight that this leaf stands for."""
    raise NotImplementedError

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w[m, n]`, or `x[..., n] @ w^T`, in `x.dtype`."""
    return self.resolved().dot(x, transpose)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the weight."""
    return self.resolved().take(ids)

  def materialize(self) -> jax.Array:
    """Returns the array `[..., m, n]` that this leaf stands for."""
    return self.resolved().materialize()

  def delta(self) -> jax.Array:
    """Returns what is added to W: `f32[..., m, n]`."""
    return self.resolved().delta()


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('adapted',), meta_fields=('blocks',)
)
@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Variant):
  """`W + s diag(A_1 B_1, ..., A_k B_k)`: each of k slices of the inputs goes to one of the outputs.

  The rows of slice `j` of A and the columns of slice `j` of B are `A_j` and `B_j`: as many numbers
  and operations as one product of rank r, for a sum of rank `k r`.

  Attributes:
    adapted: W, A and B.
    blocks: k, which divides m and n.

  References:
    Ren et al., `MELoRA <https://arxiv.org/abs/2402.17263>`_, 2024
  """

  adapted: Adapted
  blocks: int

  TRAINED: ClassVar = ('adapted',)

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ w[m, n]`, or `x[..., n] @ w^T`, in `x.dtype`."""
    inner = self.adapted
    a, b = (materialize(factor).astype(x.dtype) for factor in (inner.a, inner.b))
    fixed = (inner.scale, inner.dropout, self.blocks, transpose)
    return _by_blocks(x, inner.base, a, b, inner.key, *fixed)

  def resolved(self) -> Adapted:
    """Returns it with factors of rank `k r` that are zero outside their slices."""
    a, b, k = materialize(self.adapted.a), materialize(self.adapted.b), self.blocks
    *batch, m, r = a.shape
    n = b.shape[-1]
    same = jnp.eye(k, dtype=bool).reshape(*[1] * len(batch), k, 1, k, 1)
    a = jnp.where(same, a.reshape(*batch, k, m // k, 1, r), 0).reshape(*batch, m, k * r)
    b = jnp.expand_dims(b.reshape(*batch, r, k, n // k), -4)
    b = jnp.where(same, b, 0).reshape(*batch, k * r, n)
    return dataclasses.replace(self.adapted, a=a, b=b)

  def spread(self, entries: tuple) -> 'BlockDiagonal':
    """See `memjax.sharding.weight_shardings`."""
    return dataclasses.replace(self, adapted=self.adapted.spread(entries))


@functools.partial(jax.checkpoint, static_argnums=(5, 6, 7, 8))
def _by_blocks(x, base, a, b, key, scale, dropout, blocks, transpose):
  """The product of each slice with its own factors, of which only the arguments are kept."""
  base = jax.lax.stop_gradient(base)
  a, b = a.reshape(blocks, -1, a.shape[-1]), b.reshape(b.shape[0], blocks, -1)
  cut = dropped(x, key, dropout).reshape(*x.shape[:-1], blocks, -1)
  if transpose:
    y = jnp.einsum('...kr,kmr->...km', jnp.einsum('...kn,rkn->...kr', cut, b), a)
  else:
    y = jnp.einsum('...kr,rkn->...kn', jnp.einsum('...km,kmr->...kr', cut, a), b)
  return dot(x, base, transpose) + scale * y.reshape(*x.shape[:-1], -1)


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('adapted', 'gate'), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Gated(Variant):
  """`W + s A diag(g) B`, of which g is trained too: where it is zero, a rank less.

  Attributes:
    adapted: W, A and B.
    gate: g: f32[..., r].

  References:
    Ding et al., `Sparse Low-rank Adaptation of Pre-trained Language Models
    <https://arxiv.org/abs/2311.11696>`_, 2023
  """

  adapted: Adapted
  gate: jax.Array | Weight

  TRAINED: ClassVar = ('adapted', 'gate')

  def resolved(self) -> Adapted:
    """Returns it with `A diag(g)` for A."""
    a, gate = materialize(self.adapted.a), materialize(self.gate)
    return dataclasses.replace(self.adapted, a=(a * gate[..., None, :]).astype(a.dtype))

  def spread(self, entries: tuple) -> 'Gated':
    """See `memjax.sharding.weight_shardings`."""
    return Gated(self.adapted.spread(entries), (*entries[:-2], None))


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('adapted', 'square', 'strength', 'noise_key'),
  meta_fields=('noise',),
)
@dataclasses.dataclass(frozen=True)
class Flat(Variant):
  """`W + s A B + E`, where E is noise of a step: factors are trained for all of a neighbourhood.

  Each column of E is normal with a standard deviation of `strength / sqrt(m)` times the column's
  length in the sum. It is drawn wherever the weight is used, and again in the backward pass: never
  stored, hence never to be taken off again.

  Attributes:
    adapted: W, A and B.
    square: Squared lengths of W's columns, f32[..., n].
    strength: f32[...], a number a matrix.
    noise_key: Raw key of E, `u32[..., k]`; None for no noise, as in evaluation.
    noise: The law of E, as in `memjax.weights.Perturbed`.

  References:
    Li et al., `Flat-LoRA <https://arxiv.org/abs/2409.14396>`_, 2024
  """

  adapted: Adapted
  square: jax.Array
  strength: jax.Array
  noise_key: jax.Array | None
  noise: Any

  TRAINED: ClassVar = ('adapted',)

  @property
  def key(self) -> jax.Array | None:
    """Raw key of the noise."""
    return self.noise_key

  def resolved(self) -> Adapted:
    """Returns it with `W + E` for W."""
    if self.noise_key is None:
      return self.adapted
    rows = jax.eval_shape(materialize, self.base).shape[-2]
    lengths = column_lengths(self.adapted, self.square)
    scale = jnp.expand_dims(self.strength, -1) / math.sqrt(rows) * lengths
    noisy = Perturbed(self.base, self.noise_key, scale[..., None, :], self.noise)
    return dataclasses.replace(self.adapted, base=noisy)

  def with_key(self, key: jax.Array | None) -> 'Flat':
    """Returns the leaf with other noise, or none."""
    # What drops activations, if anything does, is another stream of the same address.
    other = None if key is None or self.adapted.key is None else key ^ np.uint32(0x9E3779B9)
    return dataclasses.replace(self, adapted=self.adapted.with_key(other), noise_key=key)

  def spread(self, entries: tuple) -> 'Flat':
    """See `memjax.sharding.weight_shardings`."""
    *batch, _, n = entries
    return dataclasses.replace(
      self,
      adapted=self.adapted.spread(entries),
      square=(*batch, n),
      strength=tuple(batch),
      noise_key=None if self.noise_key is None else (*batch, None),
    )


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('adapted', 'share'), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Fading(Variant):
  """`l W + s A B`, where l goes from 1 to 0: in the end the factors stand alone.

  Attributes:
    adapted: W, A and B.
    share: l: f32[...], a number a matrix.

  References:
    Hwang et al., `PC-LoRA: Low-Rank Adaptation for Progressive Model Compression with Knowledge
    Distillation <https://arxiv.org/abs/2406.09117>`_, 2024
  """

  adapted: Adapted
  share: jax.Array

  TRAINED: ClassVar = ('adapted',)

  def resolved(self) -> Adapted:
    """Returns it with `l W` for W."""
    return dataclasses.replace(self.adapted, base=_Scaled(self.base, self.share))

  def delta(self) -> jax.Array:
    """Returns what is added to W, `s A B - (1 - l) W`: `f32[..., m, n]`."""
    base = jax.lax.stop_gradient(materialize(self.base)).astype(jnp.float32)
    return self.adapted.delta() - (1 - self.share[..., None, None]) * base

  def spread(self, entries: tuple) -> 'Fading':
    """See `memjax.sharding.weight_shardings`."""
    return Fading(self.adapted.spread(entries), tuple(entries[:-2]))


@functools.partial(jax.tree_util.register_dataclass, data_fields=('value', 'scale'), meta_fields=())
@dataclasses.dataclass(frozen=True)
class _Scaled:
  """A weight `[..., m, n]` times a number f32[...]."""

  value: jax.Array | Weight
  scale: jax.Array

  TRAINED: ClassVar = ()

  def dot(self, x, transpose=False):
    y = dot(x, self.value, transpose)
    return (self.scale * y.astype(jnp.float32)).astype(y.dtype)

  def take(self, ids):
    rows = take(self.value, ids)
    return (self.scale * rows.astype(jnp.float32)).astype(rows.dtype)

  def materialize(self):
    value = materialize(self.value)
    return (self.scale[..., None, None] * value.astype(jnp.float32)).astype(value.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=('a', 'b'), meta_fields=('scale',))
@dataclasses.dataclass(frozen=True)
class Product:
  """`s A B`: a matrix of rank r and nothing else, in `r (m + n)` numbers.

  Attributes:
    a: A: `[..., m, r]`.
    b: B: `[..., r, n]`.
    scale: s.
  """

  a: jax.Array | Weight
  b: jax.Array | Weight
  scale: float = 1.0

  TRAINED: ClassVar = ('a', 'b')

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ (s A B)[m, n]`, or with the transpose, in `x.dtype`."""
    into, out = (self.b, self.a) if transpose else (self.a, self.b)
    return self.scale * dot(dot(x, into, transpose), out, transpose)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the product."""
    return self.scale * dot(take(self.a, ids), self.b)

  def materialize(self) -> jax.Array:
    """Returns the product `[..., m, n]`."""
    a, b = materialize(self.a), materialize(self.b)
    return self.scale * jnp.einsum('...mr,...rn->...mn', a, b)

  def spread(self, entries: tuple) -> 'Product':
    """See `memjax.sharding.weight_shardings`."""
    *batch, m, n = entries
    return dataclasses.replace(
      self, a=spread(self.a, (*batch, m, None)), b=spread(self.b, (*batch, None, n))
    )
