"""Perturbed where they are used, weights are as if they had been written, and come back exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memjax
from memjax import weights
from memjax.estimators.estimator import find
from memjax.optimizers.masks import decays
from tests.models import tiny

EPS = 1e-3


def mean(model, batch):
  """The mean loss, as a function of the parameters."""

  def value(params):
    total, count = model.loss(params, batch)
    return total / count

  return jax.jit(value)


def direction(params):
  """What one update of 1 along the estimate, over its slope, moves: the noise of the first draw."""
  transform = memjax.spsa(EPS)
  slope_of_one = lambda tree: sum(jnp.sum(x) for x in jax.tree.leaves(tree))
  estimate, state = transform.update(None, transform.init(params), params, value_fn=slope_of_one)
  return jax.tree.map(lambda e: e / find(state).slopes[0, 0], estimate)


@pytest.mark.slow
@pytest.mark.parametrize('tied', [False, True])
def test_a_slope_is_that_of_weights_perturbed_in_place_which_drift(tied):
  """The published way: add, evaluate, subtract twice, evaluate, add."""
  model = tiny.make(layers=2, tied=tied)
  params = tiny.random_params(model)
  value = mean(model, tiny.batch_of(model, (4, 8)))
  noise = direction(params)
  move = jax.jit(lambda tree, by: jax.tree.map(lambda x, z: x + by * z, tree, noise))
  written = move(params, EPS)
  plus = value(written)
  written = move(written, -2 * EPS)
  expected = (plus - value(written)) / (2 * EPS)
  written = move(written, EPS)
  drift = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), written, params)
  assert 0 < max(jax.tree.leaves(drift)) < 1e-6

  optimizer = memjax.mezo(0.0, EPS, form='weights')
  updates, state = optimizer.update(None, optimizer.init(params), params, value_fn=value)
  # Losses of order 5 are known to 5e-7, their difference over 2e-3 to some 5e-4.
  np.testing.assert_allclose(find(state).slopes[0, 0], expected, rtol=1e-5, atol=1e-3)
  assert abs(expected) > 0.1
  same = optax.apply_updates(params, updates)
  jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_tied_embedding_is_perturbed_once():
  model = tiny.make(layers=1, tied=True)
  params = tiny.random_params(model)

  def value_fn(view):
    table = view['embed']['embedding']
    whole = weights.materialize(table)
    rows = weights.take(table, jnp.arange(model.vocab)) - whole
    through = weights.dot(jnp.eye(32), table, transpose=True) - whole.T
    moved = jnp.max(jnp.abs(whole - params['embed']['embedding']))
    differ = jnp.maximum(jnp.max(jnp.abs(rows)), jnp.max(jnp.abs(through)))
    return jnp.where(moved > 0.1, differ, 1.0)

  optimizer = memjax.mezo(1e-3, 0.1, form='weights')
  _, state = optimizer.update(None, optimizer.init(params), params, value_fn=value_fn)
  assert find(state).value < 1e-6  # Lookup, product and array agree, on both sides.


@pytest.mark.parametrize('make', [tiny.make, lambda: memjax.models.create('opt_tiny')])
def test_decay_leaves_out_norms_and_biases(make):
  shapes = make().abstract()
  found = {
    jax.tree_util.keystr(path, simple=True, separator='/'): decayed
    for path, decayed in jax.tree.leaves_with_path(decays(shapes))
  }
  vectors = {path for path in found if path.split('/')[-1] in ('bias', 'scale')}
  assert vectors
  assert {path for path, decayed in found.items() if not decayed} == vectors
