"""Weights with a low-rank addition that is trained in their place: `W + s A B`.

Shapes in this file: a weight is `[m, n]`, its factors `A[m, r]` and `B[r, n]`; stacked leaves have
an axis of layers in front of all three. Activations are `[..., m]`.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from memjax.weights import forms
from memjax.weights.forms import Form
from memjax.weights.frozen import spread
from memjax.weights.weight import Weight, dot, is_weight, materialize, take


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('base', 'a', 'b', 'key'),
  meta_fields=('scale', 'dropout', 'form'),
)
@dataclasses.dataclass(frozen=True)
class Adapted:
  """`W + s A B`, of which the factors are trained and W is frozen: `x W + s (x A) B`.

  The product is never formed unless that takes fewer operations (`memjax.weights.forms`), nor is an
  array of W's size in the backward pass then. For the factors' gradients that pass keeps x alone,
  which neighbouring weights share; where A is not trained, `x A` in its place.

  Memory: `r (m + n)` numbers beside W. Sharded like W: A has its rows over the devices that divide
  m, B its columns over those that divide n, so that products with either need no more communication
  than those with W, and gradients of factors are all that is reduced. Where A is drawn, B is
  divided along both axes.

  Attributes:
    base: W: an array, or another `Weight`, such as a quantised one.
    a: A: an array, or a `Weight` that is not trained, such as `Drawn`.
    b: B.
    key: Raw key of the dropout, `u32[..., k]`, see `jax.random.key_data`; None drops nothing, as in
      evaluation.
    scale: s.
    dropout: Fraction of the activations that the addition does not see.
    form: In what order to multiply, where nothing is dropped; None counts operations.

  References:
    Hu et al., `LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>`_, 2021
  """

  base: jax.Array | Weight
  a: jax.Array | Weight
  b: jax.Array
  key: jax.Array | None = None
  scale: float = 1.0
  dropout: float = 0.0
  form: Form | None = None

  TRAINED: ClassVar = ('a', 'b')

  def dot(self, x: jax.Array, transpose: bool = False) -> jax.Array:
    """Returns `x[..., m] @ (W + s A B)[m, n]`, or with the transpose, in `x.dtype`."""
    into, out, swap = (self.b, self.a, True) if transpose else (self.a, self.b, False)
    if transpose or self._noisy():
      return _plain(x, self.base, into, out, self.key, self.scale, self.dropout, swap)
    return _product(self._form(x), self.scale, x, self.base, self.a, self.b)

  def take(self, ids: jax.Array) -> jax.Array:
    """Returns rows `ids` of the sum."""
    rows = jax.lax.stop_gradient(take(self.base, ids))
    return rows + (self.scale * dot(take(self.a, ids).astype(rows.dtype), self.b)).astype(
      rows.dtype
    )

  def materialize(self) -> jax.Array:
    """Returns the sum `[..., m, n]`, formed in f32, in the dtype of W."""
    base = jax.lax.stop_gradient(materialize(self.base))
    return _merged(base, materialize(self.a), self.b, self.scale).astype(base.dtype)

  def delta(self) -> jax.Array:
    """Returns what is added to W: `f32[..., m, n]`."""
    return self.scale * _low_rank(materialize(self.a), self.b)

  def with_key(self, key: jax.Array | None) -> 'Adapted':
    """Returns the leaf with another key of the dropout, or none."""
    return dataclasses.replace(self, key=key)

  def in_part(self, index: jax.Array | int) -> 'Adapted':
    """Returns the leaf with the dropout of one micro-batch, the `index`-th of an update."""
    if self.key is None:
      return self
    fold = lambda key: jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key), index))
    return self.with_key(jax.vmap(fold)(self.key) if self.key.ndim > 1 else fold(self.key))

  def spread(self, entries: tuple) -> 'Adapted':
    """See `memjax.sharding.weight_shardings`."""
    *batch, m, n = entries
    return dataclasses.replace(
      self,
      base=spread(self.base, entries),
      a=spread(self.a, (*batch, m, None)),
      # Where A is drawn, ranks are large, and B is divided along both, as W is.
      b=(*batch, m if is_weight(self.a) else None, n),
      key=None if self.key is None else (*batch, None),
    )

  def _form(self, x):
    rows = math.prod(x.shape[:-1])
    m, n = x.shape[-1], self.b.shape[-1]
    if self.form:
      return self.form
    return forms.choose(
      *(rows, m, n, self.b.shape[-2]),
      a=not is_weight(self.a),
      # In 16 bits `W + s A B` would be rounded as W is, and most of what is added be lost.
      merge=jnp.finfo(x.dtype).bits >= 32,
      devices=max(1, jax.typeof(self.b).sharding.mesh.size),
    )

  def _noisy(self) -> bool:
    """Whether activations are dropped, or factors stand in for what is trained, such as perturbed
    ones.
    """
    fixed = getattr(self.a, 'TRAINED', None) == ()
    return (self.key is not None) or is_weight(self.b) or (is_weight(self.a) and not fixed)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('base', 'a', 'b', 'key'),
  meta_fields=('scale', 'dropout', 'form'),
)
@dataclasses.dataclass(frozen=True)
class Restarted(Adapted):
  """`W + s A B` whose product joins W now and then, before factors begin anew: by itself, what it
  adds to W says nothing of what was learnt.
  """


class Around:
  """What leaves around an adapted one share; it is their field `adapted`."""

  @property
  def base(self) -> jax.Array | Weight:
    """W."""
    return self.adapted.base

  @property
  def key(self) -> jax.Array | None:
    """Raw key of the noise, `u32[..., k]`; None at rest."""
    return self.adapted.key

  def with_key(self, key: jax.Array | None):
    """Returns the leaf with another key of the dropout, or none."""
    return dataclasses.replace(self, adapted=self.adapted.with_key(key))

  def in_part(self, index: jax.Array | int):
    """Returns the leaf with the dropout of one micro-batch; other noise is the whole update's."""
    return dataclasses.replace(self, adapted=self.adapted.in_part(index))


def in_part(params: Any, index: jax.Array | int | None) -> Any:
  """Returns parameters as one micro-batch sees them: leaves with dropout have a mask of its own.

  Args:
    params: Parameters, adapted or not.
    index: i32[], the micro-batch's number in its update; None for the only one.
  """
  if index is None:
    return params

  def see(leaf):
    return leaf.in_part(index) if hasattr(leaf, 'in_part') else leaf

  return jax.tree.map(see, params, is_leaf=is_weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(form, scale, x, base, a, b):
  if form.forward == 'merged':
    return dot(x, _merged(materialize(base), materialize(a), b, scale))
  return dot(x, base) + scale * dot(dot(x, a), b)


def _forward(form, scale, x, base, a, b):
  kept = dot(x, a) if is_weight(a) and form.b == 'rows' else x
  return _product(form, scale, x, base, a, b), (kept, base, a, b)


def _backward(form, scale, residuals, dy):
  kept, base, a, b = residuals
  fixed = is_weight(a)
  thin = dot(dy, b, transpose=True)  # dY B', where it is used.
  if form.x == 'split':
    dx = dot(dy, base, transpose=True) + scale * dot(thin, a, transpose=True)
  else:
    dx = dot(dy, _merged(materialize(base), materialize(a), b, scale), transpose=True)
  matrix = _over_rows(kept, dy) if 'matrix' in (form.b, '' if fixed else form.a) else None
  da = None
  if not fixed:
    rows = form.a == 'rows'
    da = _over_rows(kept, thin, a.dtype) if rows else dot(matrix, b, transpose=True)
    da = (scale * da).astype(a.dtype)
  if form.b == 'rows':
    db = _over_rows(kept if fixed else dot(kept, a), dy, b.dtype)
  else:
    db = _over_rows(materialize(a).astype(matrix.dtype), matrix)
  return dx, None, da, (scale * db).astype(b.dtype)


_product.defvjp(_forward, _backward)


@functools.partial(jax.checkpoint, static_argnums=(5, 6, 7))
def _plain(x, base, into, out, key, scale, dropout, swap):
  """The product by the rules of differentiation, of which only the arguments are kept: the mask of
  the dropout is drawn again.
  """
  base = jax.lax.stop_gradient(base)
  thin = dot(dropped(x, key, dropout), into, transpose=swap)
  return dot(x, base, transpose=swap) + scale * dot(thin, out, transpose=swap)


def dropped(x: jax.Array, key: jax.Array | None, dropout: float) -> jax.Array:
  """Returns activations with a fraction of them zero and the others larger; all, without a key."""
  if key is None:
    return x
  kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - dropout, x.shape)
  return jnp.where(kept, x / (1 - dropout), 0).astype(x.dtype)


def _over_rows(x: jax.Array, y: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
  """`x' y`, summed over all axes but the last of each; in this dtype devices add up their sums."""
  rows = tuple(range(x.ndim - 1))
  return jax.lax.dot_general(x, y, ((rows, rows), ((), ())), preferred_element_type=dtype)


def _merged(base: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  product = _low_rank(a, b)
  return base.astype(product.dtype) + scale * product


def _low_rank(a: jax.Array, b: jax.Array) -> jax.Array:
  """`A B` in f32, or f64 if that is what they are."""
  dtype = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
  return jnp.einsum('...mr,...rn->...mn', a.astype(dtype), b.astype(dtype))
