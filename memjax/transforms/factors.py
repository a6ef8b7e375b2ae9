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


def average(tree, factors: Factors, decay, eps: float) -> Factors:
  """Moves the factors towards the means of the tree's squares plus `eps`.

  `eps` joins the means, and rows take the weight of the new inside theirs: squares are then read
  where they are summed. Those that rows and columns share would be written as an array first.
  """
  weight = 1 - decay
  add = lambda old, mean: decay * old + (mean + weight * eps)
  row = lambda old, x: add(old, jnp.mean((weight * x) * x, -1, keepdims=True))
  col = lambda old, x: add(old, weight * jnp.mean(x * x, -2, keepdims=True))
  return Factors(
    v_row=_map_present(row, factors.v_row, tree),
    v_col=_map_present(col, factors.v_col, tree),
    v=_map_present(lambda old, x: add(old, weight * (x * x)), factors.v, tree),
  )


def combine(function, like, factors: Factors):
  """The tree of `function(row, column)`, `[..., m, n]`, and of what is not factored.

  Args:
    function: Of a row and a column.
    like: Tree of the leaves.
    factors: Of the leaves.
  """
  either = lambda _, row, col, v: function(row, col) if is_masked(v) else v
  return jax.tree.map(either, like, *factors)


def rescale(updates, factors: Factors, threshold: float | None = None):
  """Divides by the roots of the second moments that the factors stand for, where there are any.

  With a threshold, every unit is then divided by `max(1, RMS / threshold)`.
  """

  def excess(rms):
    return 1.0 if threshold is None else jnp.maximum(1.0, rms / threshold)

  def divide(path, u, row, col, v):
    if not is_masked(row):
      # The rows carry the mean; a product of all three could leave the range of f32.
      row = jax.lax.rsqrt(row / jnp.mean(row, -2, keepdims=True))
      # They carry the clipping too, by an RMS that needs the squares of the gradient alone: the
      # update that is too large is not written.
      mean = jnp.mean(jnp.square(u * row) * (1 / col), (-2, -1), keepdims=True)
      return u * (row / excess(jnp.sqrt(mean))) * jax.lax.rsqrt(col)
    u = u if is_masked(v) else u * jax.lax.rsqrt(v)
    return u / excess(units.unit_rms(path, u))

  return units.map_with_path(divide, updates, *factors)


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
