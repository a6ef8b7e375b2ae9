"""Two calls of one function, side by side: what they share is computed once, and they wait for
each other where the function says so.

A program is a graph, and in which order a compiler runs it is the compiler's choice. Two forward
passes over the same weights, one written after the other, may run in that order too, and then every
weight of a block is alive until the second has used it. Traced side by side, each
`jax.lax.optimization_barrier` of the function becomes one barrier for both calls, and neither runs
ahead of the other beyond it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core


class _Two(NamedTuple):
  """A value that differs between the calls."""

  first: Any
  second: Any


def both(function: Callable, first: Any, second: Any, shared: Any) -> tuple[tuple[Any, Any], Any]:
  """Calls `function(first, shared)` and `function(second, shared)`, with the results of two calls.

  Not `vmap`: every operation has the shapes, hence the rounding, of a single call. What the
  function closes over is shared. What depends on shared values alone is computed once, also where
  it is written back to memory; inside a `jit` or a loop within the function it is not.

  Args:
    function: `function(own, shared) -> (own results, shared results)`, of pytrees of arrays.
    first: The first call's own arguments.
    second: The second's, of the same structure, shapes and dtypes.
    shared: Arguments of both.

  Returns:
    The two calls' own results, and what they share.

  Raises:
    ValueError: when a shared result depends on a call's own arguments.

  >>> f = lambda x, w: (x * w, w + 1)
  >>> (a, b), w = both(f, 1.0, 2.0, 10.0)
  >>> float(a), float(b), float(w)
  (10.0, 20.0, 11.0)
  """
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(first, shared)
  own = [_Two(*pair) for pair in zip(*map(jax.tree.leaves, (first, second)), strict=True)]
  results = _run(closed, own + jax.tree.leaves(shared))
  number = len(jax.tree.leaves(shapes[0]))
  own, shared = results[:number], results[number:]
  if any(isinstance(x, _Two) for x in shared):
    raise ValueError('a shared result depends on what only one of the two calls has')
  trees = [jax.tree.structure(shape) for shape in shapes]
  return tuple(trees[0].unflatten(_side(own, side)) for side in (0, 1)), trees[1].unflatten(shared)


def _run(closed: core.ClosedJaxpr, arguments: list) -> list:
  jaxpr = closed.jaxpr
  values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  values |= dict(zip(jaxpr.invars, arguments, strict=True))
  is_variable = lambda atom: not isinstance(atom, core.Literal)
  read = set(filter(is_variable, [*jaxpr.outvars, *(x for e in jaxpr.eqns for x in e.invars)]))
  take = lambda atoms: [values[x] if is_variable(x) else x.val for x in atoms]
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'optimization_barrier':
      values |= dict(zip(eqn.outvars, _meet(take(eqn.invars)), strict=True))
      continue
    reads = list(dict.fromkeys(filter(is_variable, eqn.invars)))
    writes = [x for x in eqn.outvars if x in read]
    # The part of the program that is this operation alone.
    alone = jaxpr.replace(constvars=[], invars=reads, outvars=writes, eqns=[eqn])
    results = _twice(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ())), take(reads))
    values |= dict(zip(writes, results, strict=True))
  return take(jaxpr.outvars)


def _twice(run: Callable, inputs: list) -> list:
  if not any(isinstance(x, _Two) for x in inputs):
    return run(*inputs)
  return [_Two(*pair) for pair in zip(run(*_side(inputs, 0)), run(*_side(inputs, 1)), strict=True)]


def _meet(inputs: list) -> list:
  """One barrier for both calls; a shared value goes through it once, and stays shared."""
  two = [isinstance(x, _Two) for x in inputs]
  seconds = [x.second for x in inputs if isinstance(x, _Two)]
  firsts, seconds = jax.lax.optimization_barrier((_side(inputs, 0), seconds))
  seconds = iter(seconds)
  return [_Two(x, next(seconds)) if pair else x for x, pair in zip(firsts, two, strict=True)]


def _side(values: list, side: int) -> list:
  return [x[side] if isinstance(x, _Two) else x for x in values]
