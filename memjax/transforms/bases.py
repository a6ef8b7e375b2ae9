"""Orthonormal bases for the leading singular vectors of one matrix.

Shapes in this file: a gradient is `[m, n]`, a basis of its column space `[m, r]`, `r <= min(m, n)`.
A basis of the row space comes from the same functions on the transposed gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax.naming import fold_in_path

# Of the products that make columns orthonormal: a TPU's default of one bf16 pass would leave them
# so to two digits only, and they are compared with their successors over thousands of steps. The
# products with the gradient follow JAX's default, like every product of the model: an error there
# tilts the subspace by its own size and no more.
PRECISION = lax.Precision.HIGH


class Basis(NamedTuple):
  """How `project` finds its subspaces.

  A tuple and not a bare function, so that `optax.inject_hyperparams` does not take it for a
  schedule.
  """

  # (gradient [m, n], previous [m, r], key, count) -> basis [m, r], orthonormal columns. `previous`
  # is the identity's first r columns as long as the matrix has had no basis of its own; `count`
  # i32[] are the updates before this one.
  refresh: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array] | None
  # A basis that no gradient has a say in has this instead: it is not stored, but drawn again in
  # every update. (address, shape [..., m, r]) -> [..., m, r].
  draw: Callable[['Address', tuple[int, ...]], jax.Array] | None = None


class Address(NamedTuple):
  """Whose basis is drawn: the same address gives the same bits on any mesh, after any restart."""

  path: str  # The leaf's.
  axis: int  # -2 for a basis of the leaf's column space, -1 for its row space.
  seed: int
  refresh: jax.Array  # i32[units], how often the unit's basis had been due before.
  units: jax.Array  # i32[units], the leaf's units.


def subspace_iteration(iterations: int = 2, cold_iterations: int = 4) -> Basis:
  r"""Follows the leading singular vectors, starting from the previous basis.

  One iteration is :math:`P \leftarrow \mathrm{orth}(G G^T P)`: two products and a factorisation of
  `[r, r]`. Nothing larger is factorised, so `G` and `P` keep whatever sharding they have; what is
  communicated is `r (m + n)` numbers for the products and `r * r` for each Gram matrix, never
  `m n`. Gradients of successive refreshes share most of their leading subspace, which is why two
  iterations from the previous basis are enough; the first basis starts from random signs and takes
  `cold_iterations`.

  Args:
    iterations: Iterations at each refresh.
    cold_iterations: Iterations at a matrix's first refresh.

  Returns:
    A `Basis`. A gradient of zeros keeps the previous basis.

  Raises:
    ValueError: if either count is less than 1.
  """
  if iterations < 1 or cold_iterations < 1:
    raise ValueError(
      f'subspace_iteration needs at least one iteration at every refresh, got '
      f'iterations={iterations}, cold_iterations={cold_iterations}'
    )

  def refresh(gradient, previous, key, count=None):
    del count
    (_, n), rank = gradient.shape, previous.shape[1]
    cold = jnp.array_equal(previous, jnp.eye(*previous.shape, dtype=previous.dtype))
    noise = lax.cond(
      cold,
      lambda: jax.random.rademacher(key, (n, rank), previous.dtype),
      lambda: jnp.zeros((n, rank), previous.dtype),
    )
    # By a factor known beforehand: finding the product's own largest entry keeps XLA from fusing
    # it, and takes a TPU's compiler 20 s longer a leaf.
    unit = 1 / _largest(gradient)

    def iterate(step, basis):
      right = jnp.where(cold & (step == 0), noise, (gradient.T @ basis) * unit)
      # Where the gradient has fewer than r independent directions, the old ones stay: in exact
      # arithmetic basis^T G G^T basis is positive semi-definite, and cancels none of them.
      return orthonormalise(gradient @ right, fill=basis)

    basis = lax.fori_loop(0, jnp.where(cold, cold_iterations, iterations), iterate, previous)
    return jnp.where(jnp.any(gradient != 0), basis, previous)

  return Basis(refresh)


def svd() -> Basis:
  """Takes the leading left singular vectors exactly, as published.

  Costs `O(m n min(m, n))` at low arithmetic intensity, and every device gathers the whole matrix:
  meant for small models and as the reference for `subspace_iteration`. The largest entry of each
  vector is made positive, since the sign that a LAPACK returns is arbitrary and stale moments would
  meet a flipped basis.
  """

  def refresh(gradient, previous, key, count=None):
    del key, count
    left, _, _ = jnp.linalg.svd(gradient, full_matrices=False)
    basis = fix_signs(left[:, : previous.shape[1]])
    return jnp.where(jnp.any(gradient != 0), basis, previous)

  return Basis(refresh)


def random_projection() -> Basis:
  r"""Draws every basis with entries :math:`N(0, 1 / r)`, and stores none.

  Not orthonormal, but :math:`E[P P^T] = I`: norms survive the projection on average, which is all
  that APOLLO asks of it. In its place the state holds nothing; an update draws the `[..., m, r]`
  numbers of one leaf at a time, again from their address, which takes less time than the product
  with the gradient and communicates nothing.
  """

  def draw(address, shape):
    *batch, m, rank = shape
    root = fold_in_path(jax.random.key(address.seed), address.path)
    root = jax.random.fold_in(root, address.axis + 2)

    def one(refresh, unit):
      key = jax.random.fold_in(jax.random.fold_in(root, refresh), unit)
      return jax.random.normal(key, (m, rank))

    drawn = jax.vmap(one)(address.refresh, address.units) * rank**-0.5
    return drawn.reshape(*batch, m, rank)

  return Basis(None, draw)


def random_subspace() -> Basis:
  """Takes uniformly random subspaces, with orthonormal bases; the gradient has no say.

  A Gaussian matrix made orthonormal spans every subspace with the same probability. The bases are
  stored, as `then` needs where another kind came before.
  """

  def refresh(gradient, previous, key, count=None):
    del gradient, count
    noise = jax.random.normal(key, previous.shape, previous.dtype)
    return orthonormalise(noise, fill=previous)

  return Basis(refresh)


def then(first: Basis, after: int, second: Basis) -> Basis:
  """Finds bases by `first` in `after` updates, and by `second` from then on.

  Raises:
    ValueError: for a kind that is drawn anew and not found.
  """
  if first.refresh is None or second.refresh is None:
    raise ValueError(
      'bases of which one kind follows another are kept, and random_projection() is drawn anew in '
      'every update; use svd(), subspace_iteration() or random_subspace()'
    )

  def refresh(gradient, previous, key, count):
    arguments = gradient, previous, key, count
    return lax.cond(count < after, first.refresh, second.refresh, *arguments)

  return Basis(refresh)


def fix_signs(basis):
  """Makes the entry of largest magnitude in each column `[m, r]` positive."""
  largest = jnp.argmax(jnp.abs(basis), axis=0, keepdims=True)
  return basis * jnp.sign(jnp.take_along_axis(basis, largest, axis=0))


def orthonormalise(tall, fill):
  """Gives `tall` `[m, r]` orthonormal columns with the same leading spans, by Cholesky-QR.

  Only the Gram matrix `[r, r]` is factorised. `fill` `[m, r]` supplies directions that `tall` has
  not got; it enters at 1e-6, just above the rounding errors of an f32 product. A shifted pass
  raises a small singular value at least a hundredfold and leaves the large ones at 1, so that after
  two the third needs no shift. Where none was needed a second pass ends at rounding. Devices of a
  mesh agree on the number, as each has the whole Gram matrix.
  """

  # A loop and not copies: a program holds one factorisation a leaf and side, and compiles faster.
  def another(carry):
    done, passes, tall = carry
    tall, shifted = _cholesky_qr(tall)
    return done + 1, jnp.where(shifted, 3, passes), tall

  start = jnp.int32(0), jnp.int32(2), _unit_scale(tall) + 1e-6 * fill
  return lax.while_loop(lambda carry: carry[0] < carry[1], another, start)[-1]


def _cholesky_qr(tall):
  """Multiplies `tall` by its Gram matrix's inverse Cholesky factor; says if that took a shift."""
  gram = _dot(tall.T, tall)
  # Columns of unit length: for columns near singular vectors that alone makes the Gram matrix well
  # conditioned. A column of zeros stays one.
  norms = jnp.diagonal(gram)
  scales = jnp.where(norms > 0, lax.rsqrt(jnp.where(norms > 0, norms, 1)), 0)
  gram = gram * scales[:, None] * scales[None, :]
  identity = jnp.eye(*gram.shape, dtype=gram.dtype)

  # Without a shift first: then the columns come out orthonormal to rounding. A Gram matrix that is
  # singular to rounding takes one that exceeds its rounding errors, which add up for nearly equal
  # columns.
  least = gram.shape[0] * float(jnp.finfo(gram.dtype).eps)

  def failed(carry):
    shift, lower = carry
    return jnp.isnan(lower[-1, -1]) & (shift < 1)

  def factorise(carry):
    shift, _ = carry
    lower = jnp.linalg.cholesky(gram + shift * identity)
    return jnp.maximum(8 * shift, least), lower

  start = jnp.zeros_like(gram[0, 0]), jnp.full_like(gram, jnp.nan)
  following, lower = lax.while_loop(failed, factorise, start)
  inverse = lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True).T
  # Multiplying by the inverse, instead of a solve with `tall`, leaves `tall` as it is sharded.
  return _dot(tall, scales[:, None] * inverse), following > least


def _unit_scale(x):
  """Brings the largest magnitude to 1, so that Gram matrices neither overflow nor vanish."""
  return x / _largest(x)


def _largest(x):
  """The largest magnitude in `x`, 1 if all is zero."""
  largest = jnp.max(jnp.abs(x))
  return jnp.where(largest > 0, largest, 1)


def _dot(x, y):
  return jnp.matmul(x, y, precision=PRECISION)
