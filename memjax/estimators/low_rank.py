"""Directions of low rank: LOZO and SubZero.

Shapes in this file: a matrix leaf is `[..., m, n]`, each matrix with factors of its own; `r` is the
rank. `left` is `[..., m, r]`; the right factor is kept as `[..., r, n]`, on the axes of its
parameter, and handed to `memjax.weights.LowRank` as `[..., n, r]`. Vectors get dense noise.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax import weights
from memjax.estimators import spsa as dense_lib
from memjax.estimators.estimator import Directions, estimator
from memjax.estimators.noise import gaussian
from memjax.estimators.spsa import times
from memjax.naming import nearest

SCALES = ('paper', 'code')
_RIGHT, _LEFT, _CORE = 1, 2, 3  # Draws of the factors, apart from those of dense noise.


def lozo(
  rank: int = 2,
  eps: float = 1e-3,
  *,
  refresh_every: int = 50,
  scale: str = 'paper',
  momentum: float | None = None,
  samples: int = 1,
  targets=None,
  form: str = 'arrays',
  seed: int = 0,
  stack: str = 'blocks',
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates a gradient along :math:`U V^T`, with U drawn every step and V every `refresh_every`.

  Both factors are Gaussian. Products with a perturbed matrix are `x w + s eps (x U) V^T` and
  nothing of the matrix's size is ever drawn. V is drawn again from its key wherever it is needed,
  so that there is no state; with `momentum`, `m r` numbers a matrix and as many as a vector has.

  Momentum is that of LOZO-M: N, an average of `g U`, stands in the subspace of V, and moves into
  the next one by :math:`N V_{old}^T V_{new} / n`.

  The published code draws V only while perturbing, so that after each refresh the update uses other
  noise than the values did (once in `refresh_every` steps). Here both draw by address.

  Args:
    rank: Of the noise, at most the shorter side of every matrix.
    eps: As in `spsa`.
    refresh_every: Estimates between two V.
    scale: `'paper'` divides the estimate by `r`, so that its mean is the gradient; `'code'`, as the
      published code, does not, so that matrices learn `r` times as fast as vectors.
    momentum: Share of N that is kept; None keeps no N.
    samples: Directions a step, all with the same V.
    targets: As in `spsa`.
    form: As in `spsa`.
    seed: As in `spsa`.
    stack: As in `spsa`.

  Raises:
    ValueError: for an argument out of range; at `init`, naming a matrix that has a side below the
      rank.

  References:
    Chen et al., `Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures
    <https://arxiv.org/abs/2410.07698>`_, 2024
  """
  if scale not in SCALES:
    raise ValueError(f'scale {scale!r} does not exist; {nearest(str(scale), SCALES)}')
  if momentum is not None and (not 0 <= momentum < 1 or samples > 1):
    raise ValueError(
      f'momentum is {momentum} with {samples} samples; it is a share in [0, 1), of one direction'
    )
  _check(rank, refresh_every)
  root, vectors = jax.random.key(seed), dense_lib.dense(gaussian, seed)
  share = 1 / rank if scale == 'paper' else 1.0

  def left(leaf, draw):
    return _factor(leaf, root, _LEFT, draw, leaf.shape[-2], rank)

  def right(leaf, number):
    return _factor(leaf, root, _RIGHT, number // refresh_every, leaf.shape[-1], rank)

  def perturb(leaf, value, draw, scale, basis):
    if not leaf.matrix:
      return vectors.perturb(leaf, value, draw, scale, basis)
    return weights.LowRank(value, left(leaf, draw), right(leaf, draw // samples), scale)

  def estimate(leaf, draw, slope, basis):
    if not leaf.matrix:
      return vectors.estimate(leaf, draw, slope, basis)
    return _outer(times(slope * share, left(leaf, draw)), right(leaf, draw // samples))

  def remember(leaf, old, draw, slope, state):
    if not leaf.matrix:
      new = momentum * old + (1 - momentum) * vectors.estimate(leaf, draw, slope, None)
      return new, new
    now, before = state.last, state.previous
    v = right(leaf, now)

    def moved():
      overlap = jnp.einsum('...nr,...ns->...rs', right(leaf, before), v) / leaf.shape[-1]
      return jnp.einsum('...mr,...rs->...ms', old, overlap)

    # Before the first estimate N is zero, in any subspace.
    same = now // refresh_every == jnp.maximum(before, 0) // refresh_every
    kept = jax.lax.cond(same, lambda: old, moved)
    new = momentum * kept + (1 - momentum) * times(slope, left(leaf, draw))
    return _outer(new * share, v), new

  def init(leaves):
    _check_sides(leaves, rank)
    if momentum is None:
      return {}, [None] * len(leaves)
    shape = lambda leaf: (*leaf.shape[:-1], rank) if leaf.matrix else leaf.shape
    return {}, [jnp.zeros(shape(leaf), leaf.dtype) if leaf.trained else None for leaf in leaves]

  directions = Directions(
    init=init,
    refresh=lambda leaves, basis, number: basis,
    perturb=perturb,
    estimate=estimate,
    remember=remember if momentum is not None else None,
  )
  return estimator(directions, eps, samples=samples, targets=targets, form=form, stack=stack)


def subzero(
  rank: int = 8,
  eps: float = 1e-3,
  *,
  refresh_every: int = 1000,
  reshape: bool = False,
  samples: int = 1,
  targets=None,
  form: str = 'arrays',
  seed: int = 0,
  stack: str = 'blocks',
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates a gradient along :math:`\sqrt{m n} / r \; U Z V^T`, with `Z` drawn every step.

  U and V have orthonormal columns, uniformly distributed: QR factors of Gaussian matrices with the
  signs of R's diagonal, without which they are not uniform. The mean of the estimate over U, V and
  Z is the gradient, and a direction's expected squared norm is `m n` as with dense noise, whose
  learning rates carry over.

  State: `r (m + n)` numbers a matrix.

  Args:
    rank: Of the noise, at most the shorter side of every matrix.
    eps: As in `spsa`.
    refresh_every: Estimates between two pairs U, V.
    reshape: Sees each matrix as the most nearly square one with as many numbers, for the long
      factors of adapters and prompts. Noise is then formed where a weight is used.
    samples: Directions a step, all with the same U and V.
    targets: As in `spsa`.
    form: As in `spsa`.
    seed: As in `spsa`.
    stack: As in `spsa`.

  Raises:
    ValueError: as `lozo`.

  References:
    Yu et al., `Zeroth-Order Fine-Tuning of LLMs in Random Subspaces
    <https://arxiv.org/abs/2410.08989>`_, 2024
  """
  _check(rank, refresh_every)
  root, vectors = jax.random.key(seed), dense_lib.dense(gaussian, seed)
  sides = lambda leaf: square_sides(math.prod(leaf.shape[-2:])) if reshape else leaf.shape[-2:]

  def init(leaves):
    _check_sides(leaves, rank, sides)
    return bases(leaves, 0), [None] * len(leaves)

  def bases(leaves, number):
    def side(which, axis):
      return [
        orthonormal(_factor(leaf, root, which, number // refresh_every, sides(leaf)[axis], rank))
        if leaf.matrix and leaf.trained
        else None
        for leaf in leaves
      ]

    right = [None if v is None else jnp.swapaxes(v, -1, -2) for v in side(_RIGHT, 1)]
    return {'left': side(_LEFT, 0), 'right': right}

  def refresh(leaves, basis, number):
    due = number % refresh_every == 0
    return jax.lax.cond(due, lambda: bases(leaves, number), lambda: basis)

  def factors(leaf, draw, basis):
    core = _factor(leaf, root, _CORE, draw, rank, rank)
    scale = math.sqrt(math.prod(sides(leaf))) / rank
    return scale * (basis['left'] @ core), jnp.swapaxes(basis['right'], -1, -2)

  def perturb(leaf, value, draw, scale, basis):
    if not leaf.matrix:
      return vectors.perturb(leaf, value, draw, scale, basis)
    return weights.LowRank(value, *factors(leaf, draw, basis), scale)

  def estimate(leaf, draw, slope, basis):
    if not leaf.matrix:
      return vectors.estimate(leaf, draw, slope, basis)
    left, right = factors(leaf, draw, basis)
    return _outer(times(slope, left), right).reshape(leaf.shape)

  directions = Directions(init=init, refresh=refresh, perturb=perturb, estimate=estimate)
  return estimator(directions, eps, samples=samples, targets=targets, form=form, stack=stack)


def orthonormal(x: jax.Array) -> jax.Array:
  """Returns the orthonormal factor of `[..., m, r]` whose triangular one has a positive diagonal:
  uniformly distributed if `x` is Gaussian.
  """
  # jaxlib's QR of a batch (0.10) waits on a CPU for the threads that it runs on: several at once
  # stand still where there are few.
  one_by_one = lambda x: lax.map(jnp.linalg.qr, x)
  flat = x.reshape(-1, *x.shape[-2:])
  q, r = lax.platform_dependent(flat, cpu=one_by_one, default=jnp.linalg.qr)
  signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1)
  return (q * signs[:, None, :]).reshape(x.shape)


def square_sides(size: int) -> tuple[int, int]:
  """Returns the two most nearly equal factors of a size, the smaller first.

  >>> square_sides(4096 * 8), square_sides(12), square_sides(7)
  ((128, 256), (3, 4), (1, 7))
  """
  small = next(a for a in range(math.isqrt(size), 0, -1) if size % a == 0)
  return small, size // small


def _outer(left, right):
  """`left right^T`, `[..., m, n]` of `[..., m, r]` and `[..., n, r]`."""
  return jnp.einsum('...mr,...nr->...mn', left, right.astype(left.dtype))


def _factor(leaf, root, which, draw, size, rank):
  """A Gaussian factor `f32[..., size, rank]` of every matrix of a leaf."""
  key = leaf.key(gaussian, jax.random.fold_in(root, which), draw)
  return gaussian.draw(key, (*leaf.shape[:-2], size, rank))


def _check(rank, refresh_every):
  if rank < 1:
    raise ValueError(f'rank is {rank}; noise has at least rank 1')
  if refresh_every < 1:
    raise ValueError(f'refresh_every is {refresh_every}; a factor serves at least one estimate')


def _check_sides(leaves, rank, sides=lambda leaf: leaf.shape[-2:]):
  for leaf in leaves:
    if leaf.matrix and leaf.trained and min(sides(leaf)) < rank:
      raise ValueError(
        f'{leaf.path}: shape {leaf.shape} has a side below rank {rank}; lower `rank`, or leave the '
        'matrix out with `targets`'
      )
