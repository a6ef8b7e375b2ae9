"""The order in which `x W + s (x A) B` is multiplied, both ways, by counted operations.

Shapes in this file: activations are `[..., m]`, `t` rows of them in all; `W[m, n]`, `A[m, r]`,
`B[r, n]`. An operation is a multiplication and an addition.
"""

import functools
import itertools
import math
from typing import NamedTuple

FORWARD = {'split': 'x W + (x A) B', 'merged': 'x (W + A B)'}


class Form(NamedTuple):
  """How a product and its derivatives are computed."""

  forward: str  # A key of `FORWARD`.
  x: str  # Of the cotangent of x: 'split', dY W' + (dY B') A', or 'merged', dY (W + A B)'.
  a: str  # Of the gradient of A: 'rows', x' (dY B'), or 'matrix', (x' dY) B'.
  b: str  # Of the gradient of B: 'rows', (x A)' dY, or 'matrix', A' (x' dY).


NAMED = {
  'split': Form('split', 'split', 'rows', 'rows'),
  'merged': Form('merged', 'merged', 'matrix', 'matrix'),
}


def choose(
  rows: int,
  m: int,
  n: int,
  rank: int,
  a: bool = True,
  merge: bool = True,
  devices: int = 1,
) -> Form:
  """Returns the form with the fewest operations.

  Args:
    rows: Rows of activations `t`.
    m: Inputs.
    n: Outputs.
    rank: Rank `r`.
    a: Whether A is trained. Where it is not, no `x' dY` is made, which would keep x in place of `x
      A`.
    merge: Whether `W + A B` may be formed, in the dtype of the activations.
    devices: That share the rows. Each counts its own against a whole W; and gradients are reduced
      over several as factors, `r (m + n)` numbers, so that no `x' dY` is made there.

  Merging pays when `m n r < t r (m + n)` and the matrix is there anyway; a matrix `x' dY` when the
  rank is above some quarter of the sides. Among equals, what makes no array of the weight's size.

  >>> choose(rows=256, m=4096, n=4096, rank=16)
  Form(forward='split', x='split', a='rows', b='rows')
  >>> choose(rows=16384, m=4096, n=4096, rank=16).forward
  'merged'

  References:
    Cherniuk et al., `RunLoRA <https://arxiv.org/abs/2312.03415>`_, 2023 (whose backward passes 6 to
    8 are counted at half of what they take, so that its choices differ)
  """
  bars = (('merged', not merge), ('matrix', devices > 1 or not a))
  barred = {word for word, out in bars if out}
  allowed = [form for form in forms() if not barred & set(form)]
  sizes = dict(rows=math.ceil(rows / devices), m=m, n=n, rank=rank, a=a)
  return min(allowed, key=functools.partial(operations, **sizes))


def forms() -> list[Form]:
  """Returns every form, those that make no array `[m, n]` first."""
  ways = itertools.product(('split', 'merged'), ('split', 'merged'), *[('rows', 'matrix')] * 2)
  return [Form(*each) for each in ways]


def operations(form: Form, rows: int, m: int, n: int, rank: int, a: bool = True) -> int:
  """Returns the operations of both passes; products that two results share are counted once."""
  return sum(math.prod(size) for size in _products(form, rows, m, n, rank, a).values())


def _products(form, t, m, n, r, a) -> dict[str, tuple[int, int, int]]:
  """Name -> sizes of each product that is computed; the forward pass's are its own."""
  forward = {'x W': (t, m, n)}
  if form.forward == 'split':
    forward |= {'x A': (t, m, r), '(x A) B': (t, r, n)}
  else:
    forward |= {'A B': (m, r, n)}
  if not a and form.b == 'rows':
    forward |= {'x A': (t, m, r)}  # Kept in place of x.
  backward = {'dY W': (t, n, m)}
  if form.x == 'split':
    backward |= {"dY B'": (t, n, r), "(dY B') A'": (t, r, m)}
  else:
    backward |= {'A B, again': (m, r, n)}
  if a and form.a == 'rows':
    backward |= {"dY B'": (t, n, r), "x' (dY B')": (m, t, r)}
  elif a:
    backward |= {"x' dY": (m, t, n), "(x' dY) B'": (m, n, r)}
  if form.b == 'rows':
    backward |= {'x A, again': (t, m, r)} if a else {}
    backward |= {"(x A)' dY": (r, t, n)}
  else:
    backward |= {"x' dY": (m, t, n), "A' (x' dY)": (r, m, n)}
  return forward | backward
