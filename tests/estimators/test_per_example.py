"""Gradients of single examples against jax.grad of each alone, and what estimates know of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import adapters
from memjax.estimators import per_example
from tests.models import tiny

MODEL = tiny.make()
BATCH = tiny.batch_of(MODEL, (8, 6))  # Sequence `i` does not count its first `i + 1` tokens.
KEY = jax.random.key(3)
EPS = 4e-3


def plain():
  return tiny.random_params(MODEL)


def adapted():
  params = adapters.attach(plain(), adapters.LoRA(rank=4, alpha=8.0), jax.random.key(1))
  factor = params['blocks']['attn']['v']['kernel']
  moved = adapters.replaced(factor, {'b': factor.b + 0.1})  # Zero at first.
  params['blocks']['attn']['v'] = {'kernel': moved}
  return params


@functools.cache
def whole_gradients(make):
  """Of the mean loss of one sequence after the other, through all of the model."""
  params = make()

  def loss(trained, row):
    total, count = MODEL.loss(adapters.replaced(params, trained), row)
    return total / jnp.maximum(count, 1)

  trained = adapters.trainable(params)
  grad = jax.jit(jax.grad(loss))
  rows = [{name: x[i : i + 1] for name, x in BATCH.items()} for i in range(8)]
  values = [grad(trained, row)['blocks']['attn']['v']['kernel'] for row in rows]
  return np.stack([np.ravel(v['b'][-1] if isinstance(v, dict) else v[-1]) for v in values])


@pytest.mark.parametrize(
  ('make', 'parts'), [(plain, 1), pytest.param(adapted, 4, marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_each_example_alone(make, parts):
  params = make()
  found = jax.jit(lambda p, b: per_example.gradients(MODEL, p, b, parts=parts))(params, BATCH)
  expected = whole_gradients(make)
  assert found.shape == expected.shape == (8, {plain: 32 * 16, adapted: 4 * 16}[make])
  # The last counts no token: nothing to learn from it, and nothing to divide by.
  assert np.abs(expected[:5]).max(axis=1).min() > 1e-3
  assert not expected[-1].any()
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@functools.cache
def estimate():
  """Jitted: the number of a draw -> slopes, directions, and the estimates made of them."""
  params = adapted()

  def run(draw, count):
    last = per_example.last_block(MODEL, params, 'attn/v/kernel')
    slopes = per_example.slopes(last, BATCH, KEY, draw, count, EPS, 1)
    directions = [per_example._direction(last, KEY, draw, jnp.int32(i)) for i in range(count)]
    found = per_example.estimates(
      MODEL, params, BATCH, root=KEY, draw=draw, directions=count, eps=EPS, parts=2
    )
    return slopes, jnp.stack([z.ravel() for z in directions]), found

  return jax.jit(run, static_argnums=1)


@pytest.mark.slow
def test_a_slope_is_the_gradient_along_its_direction():
  slopes, directions, found = estimate()(5, 2)
  expected = whole_gradients(adapted) @ directions.T
  # A central difference of f32 losses near 4: some units in the last place, 4.8e-7, over 2 eps.
  np.testing.assert_allclose(slopes, expected, rtol=2e-3, atol=5e-4)
  np.testing.assert_allclose(found, slopes @ directions / 2, rtol=0, atol=1e-3)


def test_more_directions_know_more():
  """The squared error of J directions is (d + 1) / J times the squared norm; d is 64."""
  exact = whole_gradients(adapted)[:7]
  norm = np.sum(exact**2)
  draws = [estimate()(draw, 2) for draw in range(48)]

  def error(made, count):
    """Of the mean over `count` directions."""
    slopes, directions, _ = (np.concatenate(x) for x in zip(*made[: count // 2], strict=True))
    slopes = slopes.reshape(count // 2, 8, 2).transpose(1, 0, 2).reshape(8, count)
    return np.sum((slopes[:7] @ directions / count - exact) ** 2) / norm

  # Examples share directions, so only draws average: a single direction's error has a standard
  # deviation of sqrt(2 / 64) of itself.
  assert np.mean([error([draw], 2) for draw in draws]) == pytest.approx(65 / 2, rel=0.15)
  thirds = [error(draws[i::3], 32) for i in range(3)]
  assert np.mean(thirds) == pytest.approx(65 / 32, rel=0.15)


def test_a_leaf_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match=r"no leaf 'attn/w/kernel'; the nearest is 'attn/\w/kernel'"):
    per_example.gradients(MODEL, plain(), BATCH, leaf='attn/w/kernel')
  with pytest.raises(ValueError, match='directions is 0'):
    per_example.estimates(MODEL, plain(), BATCH, root=KEY, draw=0, directions=0)
