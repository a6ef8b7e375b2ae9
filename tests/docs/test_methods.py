"""The generated page on methods says what the code is."""

import pathlib
import runpy

import pytest

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
