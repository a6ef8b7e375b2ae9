"""Which parts of the parameters are trained: the tree that gradients and optimizers see.

A leaf that holds more than is trained says so in its class, by `TRAINED`, the names of its fields
that are; an array, or a weight without that attribute, is trained as it is. So parameters describe
themselves, and a step needs no list of what is frozen.
"""

import dataclasses
from typing import Any

import jax

from memjax.weights.weight import is_weight


def trained(params: Any) -> Any:
  """Returns what is trained of parameters: a tree of the same containers.

  In place of an adapted leaf stands a dict of the fields it trains, in place of a frozen one None,
  which JAX and optax pass over: frozen weights get no gradient, no state and no update. Costs
  nothing; works on arrays, shapes and shardings alike.

  >>> import jax.numpy as jnp
  >>> from memjax.weights import Frozen
  >>> trained({'kernel': Frozen(jnp.ones((2, 2))), 'norm': jnp.ones(2)})
  {'kernel': None, 'norm': Array([1., 1.], dtype=float32)}
  """
  return jax.tree.map(_trained, params, is_leaf=is_weight)


def replaced(params: Any, values: Any) -> Any:
  """Returns parameters with other values of what is trained; the rest is passed on as it is.

  Args:
    params: Parameters.
    values: As `trained(params)` returns them; leaves may be of any kind, such as noisy weights.
  """
  return jax.tree.map(_replaced, params, values, is_leaf=is_weight)


def _fields(leaf) -> tuple[str, ...] | None:
  return getattr(leaf, 'TRAINED', None) if is_weight(leaf) else None


def _trained(leaf):
  fields = _fields(leaf)
  if fields is None:
    return leaf
  present = {name: getattr(leaf, name) for name in fields if getattr(leaf, name) is not None}
  values = {name: _trained(part) for name, part in present.items()}
  return {name: part for name, part in values.items() if part is not None} or None


def _replaced(leaf, values):
  if values is None:
    return leaf
  if _fields(leaf) is None:
    return values
  parts = {name: _replaced(getattr(leaf, name), part) for name, part in values.items()}
  return dataclasses.replace(leaf, **parts)
