"""The generated page on methods says what the code is."""

import math
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import pytest

import memjax
from memjax import compat, optimizers

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def made():
  return runpy.run_path(ROOT / 'docs' / 'make_methods.py')


def test_the_page_is_fresh(made):
  page = (ROOT / 'docs' / 'methods.md').read_text()
  assert page == made['page'](), 'run `python docs/make_methods.py`'


def test_every_optimizer_has_its_row_and_every_named_function_exists(made):
  assert made['METHODS'].keys() == optimizers.OPTIMIZERS.keys()
  page = (ROOT / 'docs' / 'methods.md').read_text()
  for name in compat.__all__:
    assert f'`compat.{name}`' in page
  assert page.count('`compat.') >= len(compat.__all__)


def bytes_of(state, m, n, r):
  """What a row's formulas come to, up to its first semicolon: 4 bytes a number unless said."""
  names = {'m': m, 'n': n, 'a': min(m, n), 'c': max(m, n), 'r': r, 'ceil': math.ceil}
  total = 0
  for formula, unit in re.findall('`([^`]+)`( bytes)?', state.split(';')[0]):
    product = re.sub(r'(?<=[\w)]) (?=[\w(])', ' * ', formula)
    total += eval(product, names) * (1 if unit else 4)
  return total


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_formulas_are_the_state_of_a_matrix(made, name):
  method, (m, n) = made['METHODS'][name], (4096, 11008)
  optimizer = optimizers.OPTIMIZERS[name](1e-3, **method.arguments)
  matrix = {'mlp': {'up': {'kernel': jax.ShapeDtypeStruct((2, m, n), jnp.float32)}}}
  state = [x for x in jax.tree.leaves(jax.eval_shape(optimizer.init, matrix)) if x.ndim]
  found = sum(x.size * x.dtype.itemsize for x in state)
  assert found == 2 * bytes_of(method.state, m, n, method.arguments.get('rank'))


def test_every_optimizer_but_optaxs_own_is_a_function_of_the_package():
  assert not [
    name for name in optimizers.OPTIMIZERS.keys() - {'adamw', 'sgd'} if not hasattr(memjax, name)
  ]
