"""From a plain nested dict of parameters to Flax modules and back.

A module here only declares: its `Param`s hold `jax.ShapeDtypeStruct`s, so building a 70B model
allocates nothing. `bind` puts real leaves (arrays or `memjax.weights.Weight`s) in their place for
the length of one call.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import weights
from memjax.naming import path_string

Module = TypeVar('Module', bound=nnx.Module)


def declare(*shape: int, dtype: jnp.dtype) -> nnx.Param:
  """Declares a parameter by shape and dtype, without allocating it."""
  return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))


def shapes(module: nnx.Module) -> dict[str, Any]:
  """Returns the nested dict of `jax.ShapeDtypeStruct`s that `bind` expects for `module`."""
  return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def bind(module: Module, params: dict[str, Any]) -> Module:
  """Returns `module` holding `params`.

  Args:
    module: A module of declared parameters.
    params: Nested dict with the module's own keys; leaves are arrays or `memjax.weights.Weight`s.

  Raises:
    ValueError: naming the keys that are missing or unexpected.
  """
  expected, given = set(paths(shapes(module))), set(paths(params))
  if expected != given:
    raise ValueError(
      f'{type(module).__name__}: parameters missing: {sorted(expected - given)}; '
      f'unexpected: {sorted(given - expected)}.'
    )
  structure, _ = nnx.split(module)
  return nnx.merge(structure, nnx.State(jax.tree.map(nnx.Param, params, is_leaf=weights.is_weight)))


def paths(tree: Any) -> list[str]:
  """Returns the slash-joined path of every parameter leaf.

  >>> paths({'attn': {'q': {'kernel': 0}}})
  ['attn/q/kernel']
  """
  leaves = jax.tree.leaves_with_path(tree, is_leaf=weights.is_weight)
  return [path_string(path) for path, _ in leaves]
