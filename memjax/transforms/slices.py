"""Elementwise functions, run slice by slice so that their intermediates are small.

Shapes in this file: an array `[L, m, n]` or `[m, n]` is viewed as `[c, ...]`, `c` slices.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax

# Primitives whose result at an index depends on their operands at that index only.
# fmt: off
_ELEMENTWISE = frozenset({
  'abs', 'add', 'and', 'cbrt', 'ceil', 'clamp', 'convert_element_type', 'copy', 'copy_p', 'cos',
  'div', 'eq', 'erf', 'exp', 'exp2', 'expm1', 'floor', 'ge', 'gt', 'integer_pow', 'is_finite',
  'le', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul', 'ne', 'neg', 'not', 'or', 'pow',
  'reduce_precision', 'rem', 'round', 'rsqrt', 'select_n', 'sign', 'sin', 'sqrt', 'square',
  'stop_gradient', 'sub', 'tan', 'tanh', 'xor',
})
# fmt: on

# Numbers in a slice: 2 MiB in f32, what a core's cache holds. A GPU, which waits for its host once
# a slice, has more of them: 32 MiB, still nothing beside a model.
NUMBERS = 2**19
GPU_TIMES = 16


class Counts(NamedTuple):
  """How many slices an array is cut into."""

  default: int
  gpu: int


def is_elementwise(function, *args) -> bool:
  """Whether `function` treats every number of its arrays alone, by the operations it is made of.

  Scalars may depend on scalars in any way. One reduction, product, sort or draw of noise makes the
  answer no; so does what is not known.

  >>> import jax.numpy as jnp
  >>> is_elementwise(lambda x: jnp.sqrt(x) / 2, jnp.ones(3)), is_elementwise(jnp.sum, jnp.ones(3))
  (True, False)
  """
  return _is_elementwise(jax.make_jaxpr(function)(*args).jaxpr)


def _is_elementwise(jaxpr) -> bool:
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    shapes = {x.aval.shape for x in (*equation.invars, *equation.outvars)} - {()}
    if not shapes:
      continue
    if name in ('jit', 'pjit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call', 'remat'):
      called = next(p for p in equation.params.values() if hasattr(_open(p), 'eqns'))
      if not _is_elementwise(_open(called)):
        return False
    elif name == 'broadcast_in_dim':
      if equation.invars[0].aval.shape != ():
        return False
    elif name not in _ELEMENTWISE or len(shapes) > 1:
      return False
  return True


def _open(jaxpr):
  return getattr(jaxpr, 'jaxpr', jaxpr)


def count(shape, rows: int) -> Counts:
  """Slices to cut an array into so that none has more than `NUMBERS` numbers.

  >>> count((32_000, 4096), 32), count((256, 512), 32)
  (Counts(default=250, gpu=20), Counts(default=1, gpu=1))

  Args:
    shape: Shape of the array, or of a device's part of it.
    rows: The last axis but one may be cut into parts that this divides; 0 if it may not, because
      devices share it. The leading axis of `[L, m, n]` always may.
  """
  return Counts(_count(shape, rows, NUMBERS), _count(shape, rows, GPU_TIMES * NUMBERS))


def _count(shape, rows, numbers):
  wanted = math.prod(shape) / numbers
  if len(shape) < 2 or wanted <= 1:
    return 1
  layers = shape[0] if len(shape) > 2 else 1
  counts = _divisors(layers)
  if rows and len(shape) < 4 and shape[-2] % rows == 0:
    counts += [layers * d for d in _divisors(shape[-2] // rows)]
  return min((c for c in counts if c >= wanted), default=max(counts))


def _divisors(number: int) -> list[int]:
  return [d for d in range(1, number + 1) if number % d == 0]


def view(x, count: int):
  """Views an array as `[count, ...]` slices: a layer each, some layers, or some rows of a layer."""
  layers = x.shape[0] if x.ndim > 2 else 1
  if x.ndim > 2 and layers == count:
    return x
  if x.ndim > 2 and layers % count == 0:
    return x.reshape(count, layers // count, *x.shape[1:])
  return x.reshape(count, x.shape[-2] * layers // count, x.shape[-1])


def run(function, arrays, counts: Counts):
  """Maps `function` over slices of a pytree of arrays, in place.

  The loop carries the arrays and overwrites what it has read: `lax.scan` would hold a second copy
  of every result until its end.

  Args:
    function: (index of the slice, pytree of slices, number of slices) -> pytree of the same shapes
      and dtypes.
    arrays: Pytree of arrays.
    counts: Number of slices.
  """
  loop = lambda count: functools.partial(_loop, function, count)
  if counts.gpu == counts.default:
    return _loop(function, counts.default, arrays)
  gpu = loop(counts.gpu)
  return lax.platform_dependent(arrays, cuda=gpu, rocm=gpu, default=loop(counts.default))


def _loop(function, count, arrays):
  def body(at, views):
    taken = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, at, keepdims=False), views)
    # A loop of one trip, which the compiler does not see through. Otherwise XLA's CPU backend fuses
    # the reading with the arithmetic, finds that one array is read while another is written, and
    # copies all of them, whole, for every slice.
    made = lax.fori_loop(at, at + 1, lambda at, x: function(at, x, count), taken)
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, at, 0), views, made)

  views = lax.fori_loop(0, count, body, jax.tree.map(lambda x: view(x, count), arrays))
  return jax.tree.map(lambda x, like: x.reshape(like.shape), views, arrays)
