"""What the results of a function depend on, read off its trace: nothing is computed."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.extend import core

Labels = frozenset[Hashable]

NOISE = 'noise'  # Label of random bits whose key does not depend on what makes them differ.
_DRAWS = {'random_bits', 'threefry2x32', 'rng_bit_generator'}
_NOTHING: Labels = frozenset()


def trace(function: Callable, args: Any, labels: Any, apart: Hashable = None) -> Any:
  """Returns for every leaf of `function(*args)` the labels of the arguments it may depend on.

  Errs on the side of more: a result counts as dependent on all that a primitive reads.

  Args:
    function: Function of pytrees of arrays.
    args: Tuple of its arguments, as arrays or shapes.
    labels: One label a leaf of `args`, in the order of `jax.tree.leaves`.
    apart: Label without which random bits are labelled `NOISE`: they would be equal in calls that
      differ in that argument only.

  >>> both = lambda x, y: (x + 1, x + y)
  >>> [sorted(found) for found in trace(both, (1.0, 2.0), ['x', 'y'])]
  [['x'], ['x', 'y']]
  """
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
  found = _walk(closed.jaxpr, [frozenset([label]) for label in labels], apart)
  return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _walk(jaxpr, inputs: list[Labels], apart) -> list[Labels]:
  known = dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    return _NOTHING if isinstance(atom, core.Literal) else known.get(atom, _NOTHING)

  for eqn in jaxpr.eqns:
    outputs = _apply(eqn, [read(atom) for atom in eqn.invars], apart)
    known.update(zip(eqn.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn, inputs: list[Labels], apart) -> list[Labels]:
  inner = [_open(p) for p in eqn.params.values() if isinstance(p, core.ClosedJaxpr | core.Jaxpr)]
  if eqn.primitive.name == 'cond':
    results = [_walk(_open(branch), inputs[1:], apart) for branch in eqn.params['branches']]
    return [_union(inputs[0], *column) for column in zip(*results)]
  if eqn.primitive.name in ('scan', 'while'):
    return _loop(eqn, inputs, apart)
  if len(inner) == 1 and len(inner[0].invars) == len(inputs):  # jit, checkpoint, custom_jvp_call.
    return _walk(inner[0], inputs, apart)
  everything = _union(*inputs)
  if eqn.primitive.name in _DRAWS and apart not in everything:
    everything |= {NOISE}
  return [everything] * len(eqn.outvars)


def _loop(eqn, inputs, apart):
  """Runs a loop's body on labels until what it carries stands still."""
  p = eqn.params
  if eqn.primitive.name == 'scan':
    body = _open(p['jaxpr'])
    consts, carry, rest = _cut(inputs, *_scanned(eqn, body))
    test = lambda carry: _NOTHING
  else:
    body, ask = _open(p['body_jaxpr']), _open(p['cond_jaxpr'])
    outer, consts, carry = _cut(inputs, p['cond_nconsts'], p['body_nconsts'])
    rest = []
    test = lambda carry: _walk(ask, [*outer, *carry], apart)[0]
  while True:
    outputs = _walk(body, [*consts, *carry, *rest], apart)
    turn = test(carry)
    after = [_union(old, new, turn) for old, new in zip(carry, outputs)]
    if after == carry:
      return after + outputs[len(carry) :]
    carry = after


def _scanned(eqn, body) -> tuple[int, int]:
  """How many inputs of a scan are constants, and how many are carried.

  JAX's versions name the counts differently; by shape, the body sees a slice of what is scanned and
  the whole of everything else.
  """
  whole = lambda outer, inner: outer.aval.ndim == inner.aval.ndim
  carried = sum(map(whole, eqn.outvars, body.outvars))
  return sum(map(whole, eqn.invars, body.invars)) - carried, carried


def _cut(items, first, second):
  return items[:first], items[first : first + second], items[first + second :]


def _open(jaxpr):
  return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _union(*labels: Labels) -> Labels:
  return _NOTHING.union(*labels)
