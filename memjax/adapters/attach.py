"""Which leaves of the parameters are adapted, and what becomes of the others.

Shapes in this file: a matrix is `[m, n]`, stacked `[L, m, n]`; each matrix of a stack is adapted
with factors of its own.
"""

import re
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.adapters.merge import over
from memjax.naming import fold_in_path, nearest, path_string
from memjax.transforms.targets import default_targets


class Spec(Protocol):
  """How leaves are adapted: `memjax.adapters.LoRA` and its kin."""

  rank: int
  targets: str  # Regular expression searched in leaf paths; '' the layers' matrices.
  rest: str  # Likewise, of what is trained beside the adapters; '' nothing, '.*' everything.

  def adapt(self, matrix: jax.Array, key: jax.Array) -> Any:
    """Returns the leaf that stands for a matrix `[m, n]` from now on, of the same value."""


def attach(
  params: Any, spec: Spec, key: jax.Array, leaves: Mapping[str, Spec] | None = None
) -> Any:
  """Returns parameters in which chosen matrices are adapted and others frozen.

  The function that the parameters stand for is the same as before, and what is trained of it is
  what `memjax.adapters.trainable` returns. Trace it under `jit`, together with what draws the
  parameters, to place factors as they are made.

  Args:
    params: Tree of arrays; matrices `[m, n]` or stacked `[L, m, n]`.
    spec: What to adapt, and how.
    key: PRNG key; a leaf's factors have an address: its path, then the layer.
    leaves: Path of a leaf -> its own specification, such as one of another rank, in place of
      `spec.targets`.

  Raises:
    ValueError: naming the leaf: for a path or a pattern that matches none, a leaf that is no
      matrix, a rank above a side, a leaf that is adapted or frozen already.

  >>> import jax
  >>> from memjax import adapters
  >>> params = {'attn': {'q': jnp.ones((8, 8))}, 'norm': jnp.ones(8)}
  >>> adapted = adapters.attach(params, adapters.LoRA(rank=2, targets='attn'), jax.random.key(0))
  >>> jax.tree.map(jnp.shape, adapters.trainable(adapted))
  {'attn': {'q': {'a': (8, 2), 'b': (2, 8)}}, 'norm': None}
  """
  named = jax.tree.leaves_with_path(params, is_leaf=weights.is_weight)
  named = {path_string(path): leaf for path, leaf in named}
  check_plain(named)
  if unknown := [path for path in leaves or () if path not in named]:
    raise ValueError(f'{unknown[0]} is no leaf to adapt; {nearest(unknown[0], named)}')
  leaves = leaves or dict.fromkeys(chosen(named, spec.targets), spec)
  for path in filter(leaves.__contains__, named):
    _check(path, named[path], leaves[path])
    if hasattr(spec, 'check'):
      leaves[path].check(path, weights.whole(named[path]).shape[-2:])
  if spec.rest and spec.rest != '.*' and not any(re.search(spec.rest, path) for path in named):
    raise ValueError(f'rest={spec.rest!r} matches no leaf; {nearest(spec.rest, named)}')

  def decide(path, leaf):
    path = path_string(path)
    if path in leaves:
      return _adapt(leaf, leaves[path], fold_in_path(key, path))
    if not (spec.rest and re.search(spec.rest, path)):
      return weights.Frozen(leaf)
    if isinstance(leaf, weights.NF4):
      raise ValueError(
        f'{path} is held in 4 bits and stays as it is, but rest={spec.rest!r} would train it; '
        'adapt it with targets, or leave it out of rest'
      )
    return leaf

  return jax.tree.map_with_path(decide, params, is_leaf=weights.is_weight)


def with_factors(params: Any, factors: Mapping[str, Mapping[str, Any]]) -> Any:
  """Returns adapted parameters with other factors, in the dtype of those they had.

  Args:
    params: Parameters, by `attach`.
    factors: Path of an adapted leaf -> its `a`, `b` and, of DoRA, `magnitude`.
  """

  def put(path, leaf):
    new = dict(factors.get(path_string(path), {}))
    if not new:
      return leaf
    inner = {part: new.pop(part) for part in ('a', 'b')}
    new = inner if not hasattr(leaf, 'adapted') else {'adapted': inner, **new}
    cast = jax.tree.map(lambda old, x: x.astype(old.dtype), weights.trained({'': leaf})[''], new)
    return weights.replaced({'': leaf}, {'': cast})['']

  return jax.tree.map_with_path(put, params, is_leaf=weights.is_weight)


def check_plain(named: Mapping[str, Any]) -> None:
  """Refuses leaves, by path, to which something is attached already."""
  for path, leaf in named.items():
    if isinstance(leaf, weights.Frozen) or getattr(leaf, 'TRAINED', ()):
      raise ValueError(
        f'{path} is a {type(leaf).__name__} leaf already; merge or detach what was attached before'
      )


def chosen(named: Mapping[str, Any], targets: str) -> set[str]:
  """Returns the paths of the matrices that a regular expression finds; '' the layers'.

  Args:
    named: Leaves by path.
    targets: Searched in paths.

  Raises:
    ValueError: when it finds none, with the nearest path.
  """
  if not targets:
    found = {path for path, leaf in named.items() if default_targets(path, weights.whole(leaf))}
  else:
    # Stacked norms and biases [L, n] have two axes, and are vectors all the same.
    vectors = {path for path in named if path.split('/')[-1] in ('scale', 'bias')}
    vectors |= {path for path, leaf in named.items() if len(weights.whole(leaf).shape) < 2}
    found = {path for path in named if re.search(targets, path)} - vectors
  if not found:
    raise ValueError(f'targets={targets!r} matches no matrix; {nearest(targets, named)}')
  return found


def _check(path, leaf, spec):
  shape, rank = weights.whole(leaf).shape, spec.rank
  if weights.is_weight(leaf) and hasattr(spec, 'restart'):
    raise ValueError(
      f'{path} is held as {type(leaf).__name__}, and {type(spec).__name__} would round it to few '
      'levels whenever it adds to it; keep it dense, or attach LoRA'
    )
  if len(shape) not in (2, 3):
    raise ValueError(f'{path}: shape {shape} is no matrix [m, n] or stack [L, m, n] to adapt')
  if not 1 <= rank <= min(shape[-2:]):
    raise ValueError(
      f'{path}: rank {rank} is not between 1 and {min(shape[-2:])}, the shorter side of '
      f'{shape[-2:]}; lower the rank or leave the leaf out of targets'
    )


def _adapt(leaf, spec, key):
  shape = weights.whole(leaf).shape
  if len(shape) == 2:
    return spec.adapt(leaf, key)

  def adapt_layer(layer):
    matrix, index = layer  # Which may lie in the host's memory.
    matrix = jax.device_put(matrix, jax.memory.Space.Device)
    adapted = spec.adapt(matrix, jax.random.fold_in(key, index))
    return over(adapted, None) if _base(adapted) is matrix else adapted

  # One layer after the other, since what a method computes of a matrix is in f32. What is only
  # passed on stays where it is.
  adapted = jax.lax.map(adapt_layer, (leaf, jnp.arange(shape[0])))
  return over(adapted, leaf) if _base(adapted) is None else adapted


def _base(leaf):
  return getattr(leaf, 'adapted', leaf).base
