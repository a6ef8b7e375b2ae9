"""The arithmetic of a training step, counted from its trace: products and factorisations.

What is counted is the program as it is traced, so that recomputation in the backward pass, a second
forward pass, and a method's own products are all in it. A product of `[m, k]` and `[k, n]` is
`2 m k n` operations; for a dense model that makes `6 N` a token for `N` parameters that multiply,
and `8 N` with every block rematerialised, plus attention's scores. Elementwise arithmetic is not
counted: it is limited by memory, and a thousandth of the rest.
"""

import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from memjax import build, sharding

# Leading terms for a matrix `[m, n]`, m >= n, of LAPACK's methods (Golub and Van Loan, Matrix
# Computations, 4th ed., sections 4.2, 5.2, 8.3 and 8.6).
_FACTORISATIONS = {
  'cholesky': lambda m, n: n**3 / 3,
  'triangular_solve': lambda m, n: m * n**2,
  'qr': lambda m, n: 2 * m * n**2,
  'geqrf': lambda m, n: 2 * m * n**2,
  'householder_product': lambda m, n: 2 * m * n**2,
  'svd': lambda m, n: 4 * m**2 * n + 22 * n**3,
  'eigh': lambda m, n: 9 * n**3,
}


def step_flops(config: ConfigDict) -> float:
  """Returns the operations of one update of a config, over all devices.

  A loop whose turns are known at run time only, or the dearer branch of a condition, is a refresh:
  over `refresh_every` updates a loop turns once for each layer of what it carries, and a branch is
  taken once. Without a `refresh_every` both count in every update.
  """
  parts = build_on_one(config)
  traced = jax.make_jaxpr(parts.step)(parts.state, parts.batch)
  return count(traced, refresh_every=config.optimizer.get('refresh_every', 1))


def build_on_one(config: ConfigDict) -> build.Parts:
  """Builds a config over one CPU device, as shapes; its mesh is not read."""
  return build.build(config, sharding.make_mesh(devices=jax.local_devices(backend='cpu')[:1]))


def count(jaxpr, refresh_every: int = 1) -> float:
  """Returns the operations of a jaxpr; see `step_flops`.

  >>> import jax.numpy as jnp
  >>> count(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))))
  48.0
  """
  return float(sum(_count_equation(equation, refresh_every) for equation in _equations(jaxpr)))


def _count_equation(equation, refresh_every) -> float:
  name, params = equation.primitive.name, equation.params
  shapes = [x.aval.shape for x in equation.invars if hasattr(x.aval, 'shape')]
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    inner = math.prod(shapes[0][axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  if name in _FACTORISATIONS:
    *batch, m, n = max(shapes, key=math.prod)
    return math.prod(batch) * _FACTORISATIONS[name](max(m, n), min(m, n))
  inner = [count(sub, refresh_every) for sub in _subprograms(params)]
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'while':
    turns = max((shape[0] for shape in shapes if len(shape) > 2), default=1)
    return sum(inner) * turns / refresh_every
  if params.get('branches_platforms'):  # The same in other ways: take one whose loops are known.
    return next((n for n, b in zip(inner, params['branches']) if _turns_are_known(b)), min(inner))
  if name == 'cond' and inner:
    return min(inner) + (max(inner) - min(inner)) / refresh_every
  return sum(inner)


def _turns_are_known(jaxpr) -> bool:
  return all(
    equation.primitive.name != 'while' and all(map(_turns_are_known, _subprograms(equation.params)))
    for equation in _equations(jaxpr)
  )


def _equations(jaxpr):
  return jaxpr.jaxpr.eqns if isinstance(jaxpr, ClosedJaxpr) else jaxpr.eqns


def _subprograms(params):
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, (Jaxpr, ClosedJaxpr)):
        yield item
