"""Units: what counts as one matrix, or one vector, in a leaf that stacks layers.

Shapes in this file: a matrix leaf is `[..., m, n]`, a vector leaf `[..., n]`; leading axes are
batch (scan-stacked layers, experts). Norms, clipping and factors belong to one unit and never span
layers, so that a stack is updated as its layers would be one by one.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from memjax.naming import path_string
from memjax.transforms import explicit

# A stack of norms or biases, [L, D], has two axes and is no matrix; only its name tells.
_VECTOR = re.compile(r'norm|scale|bias|^(b|ln)$|^ln_|_ln$', re.IGNORECASE)

# What is trained of an adapted matrix: its factors, and vectors beside them.
_FACTOR = re.compile(r'((?<=kernel)|(?<=embedding))(/adapted)?/[ab]$')
_BESIDE_FACTORS = re.compile(r'(kernel|embedding)/(magnitude|gate)$')


def is_matrix(path: str, leaf: Any) -> bool:
  """Whether the last two axes of a leaf are a matrix: not of norms, scales and biases.

  >>> is_matrix('blocks/attn/q/kernel', jnp.zeros([2, 8, 8]))
  True
  >>> is_matrix('blocks/attn/q/kernel/b', jnp.zeros([2, 4, 8]))  # Of an adapted matrix.
  True
  >>> is_matrix('blocks/attn_norm/scale', jnp.zeros([2, 8]))
  False
  """
  if leaf.ndim < 2 or _BESIDE_FACTORS.search(path):
    return False
  return not any(_VECTOR.search(part) for part in adapted_path(path).split('/'))


def adapted_path(path: str) -> str:
  """Returns the path of the matrix that a factor adapts; other paths as they are.

  >>> adapted_path('blocks/attn/q/kernel/a')
  'blocks/attn/q/kernel'
  """
  return _FACTOR.sub('', path)


def map_with_path(function, tree, *rest):
  """Maps `function(path, leaf, *others)` over a tree, paths written `'blocks/attn/q/kernel'`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: function(path_string(path), *leaves), tree, *rest
  )


def unit_axes(path: str, leaf: Any) -> tuple[int, ...]:
  """The axes of one unit: the last two of a matrix leaf, the last one of a vector leaf."""
  return (-2, -1) if is_matrix(path, leaf) else (-1,) * min(leaf.ndim, 1)


def batch_shape(path: str, leaf: Any) -> tuple[int, ...]:
  """The sizes of the axes before those of one unit."""
  return leaf.shape[: leaf.ndim - len(unit_axes(path, leaf))]


def unit_rms(path: str, x: jax.Array) -> jax.Array:
  """Root mean square of every unit, f32 with axes of size 1; f64 for f64."""
  square = jnp.square(x.astype(at_least_float32(x)))
  return jnp.sqrt(jnp.mean(square, axis=unit_axes(path, x), keepdims=True))


def at_least_float32(leaf):
  """The dtype of arithmetic and state: f32, or f64 for f64."""
  return jnp.promote_types(leaf.dtype, jnp.float32)


def zeros(leaf, shape=None):
  """Zeros in f32 of the leaf's shape or of one that has 1 where an axis was summed away."""
  shape = leaf.shape if shape is None else tuple(shape)
  return explicit.lay_out_like(jnp.zeros(shape, at_least_float32(leaf)), leaf)
