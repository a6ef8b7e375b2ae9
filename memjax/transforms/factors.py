"""Second moments of rows and columns, in place of one a number.

Shapes in this file: a matrix leaf is `[..., m, n]`; leading axes are batch (scan-stacked layers,
experts), and every matrix has its own factors. They keep their axes in place, the reduced one with
size 1: the parameter's sharding is theirs, and a row times a column has the parameter's shape.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms import units


class Factors(NamedTuple):
  """Averages of squares; a leaf has either a row and a column or `v`, MaskedNode elsewhere."""

  v_row: optax.Updates  # [..., m, 1] f32, means over n.
  v_col: optax.Updates  # [..., 1, n] f32, means over m.
  v: optax.Updates  # The leaf's shape, f32, of leaves that are not factored.


def is_factored(min_dim_size: int, path: str, leaf) -> bool:
  """Whether a leaf is a matrix with both sides of `min_dim_size` at least."""
  return units.is_matrix(path, leaf) and min(leaf.shape[-2:]) >= min_dim_size


def init_factors(params, factored) -> Factors:
  """Zeros for every leaf; `factored(path, leaf)` says which have rows and columns."""
  missing = optax.MaskedNode()
  either = lambda make, want: units.map_with_path(
    lambda path, p: make(p) if factored(path, p) == want else missing, params
  )
  return Factors(
    v_row=either(lambda p: units.zeros(p, (*p.shape[:-1], 1)), True),
    v_col=either(lambda p: units.zeros(p, (*p.shape[:-2], 1, p.shape[-1])), True),
    v=either(units.zeros, False),
  )


def reduce(function, tree, factors: Factors) -> Factors:
  """Rows and columns of a tree by `jnp.mean` or its like, other leaves as they are."""
  return Factors(
    v_row=_map_present(lambda _, x: function(x, -1, keepdims=True), factors.v_row, tree),
    v_col=_map_present(lambda _, x: function(x, -2, keepdims=True), factors.v_col, tree),
    v=_map_present(lambda _, x: x, factors.v, tree),
  )


def average(squares, factors: Factors, decay, eps: float) -> Factors:
  """Moves the factors towards the means of `squares + eps`, f32 of the leaves' shapes.

  `eps` joins the means, not the squares: these are then read where they are summed and need not
  exist as arrays.
  """
  means = reduce(jnp.mean, squares, factors)
  return jax.tree.map(lambda old, mean: decay * old + (1 - decay) * (mean + eps), factors, means)


def combine(function, like, factors: Factors):
  """The tree of `function(row, column)`, `[..., m, n]`, and of what is not factored.

  Args:
    function: Of a row and a column.
    like: Tree of the leaves.
    factors: Of the leaves.
  """
  either = lambda _, row, col, v: function(row, col) if is_masked(v) else v
  return jax.tree.map(either, like, *factors)


def rescale(updates, factors: Factors):
  """Divides by the roots of the second moments that the factors stand for, where there are any."""

  def divide(u, row, col, v):
    if not is_masked(v):
      return u * jax.lax.rsqrt(v)
    if is_masked(row):
      return u
    # The rows carry the mean; a product of all three could leave the range of f32.
    return u * jax.lax.rsqrt(row / jnp.mean(row, -2, keepdims=True)) * jax.lax.rsqrt(col)

  return jax.tree.map(divide, updates, *factors)


def clip(updates, threshold: float | None):
  """Divides every unit by `max(1, RMS / threshold)`."""
  if threshold is None:
    return updates
  return units.map_with_path(
    lambda path, u: u / jnp.maximum(1.0, units.unit_rms(path, u) / threshold), updates
  )


def is_masked(x) -> bool:
  """Whether a leaf has nothing here."""
  return isinstance(x, optax.MaskedNode)


def _map_present(function, tree, *rest):
  """Maps over the leaves that `tree` has; the others stay MaskedNodes."""
  return jax.tree.map(
    lambda x, *others: x if is_masked(x) else function(x, *others), tree, *rest, is_leaf=is_masked
  )


def widen(g):
  """In f32, or f64 for f64."""
  return g.astype(units.at_least_float32(g))


def square(g):
  """The squares, in f32 at least."""
  return jnp.square(widen(g))
