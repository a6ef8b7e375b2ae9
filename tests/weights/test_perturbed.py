"""Perturbed leaves against the array they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import weights
from memjax.estimators import noise as noise_lib

ROOT = jax.random.key(0)
SCALE = 0.1


def draw(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def dense(value, layers=None):
  noise = noise_lib.gaussian
  key = noise.key(ROOT, 0, 'w', None if layers is None else jnp.arange(layers))
  scale = jnp.float32(SCALE) if layers is None else jnp.full(layers, SCALE, jnp.float32)
  return weights.Perturbed(value, key, scale, noise)


def low_rank(value, rank=2):
  *batch, m, n = weights.whole(value).shape
  left, right = draw(*batch, m, rank, seed=1), draw(*batch, n, rank, seed=2)
  return weights.LowRank(value, left, right, jnp.full(batch, SCALE, jnp.float32))


@pytest.mark.parametrize('make', [dense, low_rank])
@pytest.mark.parametrize('nested', [False, True])
def test_a_leaf_answers_as_its_array(make, nested):
  value = draw(128, 6)
  # Low-rank noise of an array is joined to it on a CPU; that of a weight is added, as elsewhere.
  w = make(weights.quantise(value) if nested else value)
  array = np.asarray(w.materialize(), np.float64)
  base = np.asarray(weights.materialize(w.value), np.float64)
  if make is dense:
    expected = base + SCALE * np.asarray(w.noise.draw(w.key, (128, 6)), np.float64)
  else:
    expected = base + SCALE * np.asarray(w.left, np.float64) @ np.asarray(w.right, np.float64).T
  np.testing.assert_allclose(array, expected, atol=1e-6)
  assert np.abs(array - base).max() > 0.1
  for transpose in (False, True):
    x = draw(3, 6 if transpose else 128, seed=3)
    found = weights.dot(x, w, transpose)
    # f32 sums of 128 terms in another order.
    np.testing.assert_allclose(found, x @ (array.T if transpose else array), atol=1e-4)
  ids = jnp.array([[0, 127], [5, 5]])
  np.testing.assert_allclose(weights.take(w, ids), array[ids], atol=1e-6)
  assert jnp.isnan(weights.take(w, jnp.array([128]))).all()


@pytest.mark.parametrize('make', [dense, low_rank])
def test_layers_go_through_scan(make):
  value = draw(3, 4, 4)
  w = make(value, 3) if make is dense else make(value)
  array = w.materialize()
  x = draw(2, 4, seed=4)
  scan = lambda w: jax.lax.scan(lambda x, w: (weights.dot(x, w), None), x, w)[0]
  expected = x @ array[0] @ array[1] @ array[2]
  np.testing.assert_allclose(jax.jit(scan)(w), expected, rtol=1e-5)


def test_bfloat16_is_rounded_once():
  """A perturbation of a third of an ulp reaches a product in f32, and survives in the mean."""
  value = jnp.ones((64, 8), jnp.bfloat16)
  w = weights.Perturbed(value, jnp.zeros(2, jnp.uint32), jnp.float32(1e-3), noise_lib.rademacher)
  assert w.materialize().dtype == jnp.bfloat16
  x = jnp.eye(64)
  np.testing.assert_allclose(jnp.abs(weights.dot(x, w) - 1), 1e-3, rtol=1e-4)
  assert weights.dot(x.astype(jnp.bfloat16), w).dtype == jnp.bfloat16


def test_float64_adds_the_same_noise_exactly():
  with jax.enable_x64(True):
    value = draw(5, 7, dtype=jnp.float64)
    w = dense(value)
    z = np.asarray(w.noise.draw(w.key, (5, 7)), np.float64)
    scale = float(w.scale)
    np.testing.assert_allclose(w.materialize(), value + scale * z, rtol=1e-15)
    assert w.materialize().dtype == jnp.float64


def test_derivative_by_scale_is_the_one_along_the_noise():
  w, x = dense(draw(4, 6)), draw(3, 4, seed=5)

  def loss(scale):
    return jnp.sum(weights.dot(x, weights.Perturbed(w.value, w.key, scale, w.noise)) ** 2)

  _, slope = jax.jvp(loss, (jnp.float32(0),), (jnp.float32(1),))
  gradient = jax.grad(lambda v: jnp.sum((x @ v) ** 2))(w.value)
  np.testing.assert_allclose(slope, jnp.sum(gradient * w.noise.draw(w.key, (4, 6))), rtol=1e-5)
