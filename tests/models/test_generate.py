"""Sampling against the slow obvious loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batch_of, make, random_params

from memjax.models.generate import generate, sample


@pytest.fixture(scope='module')
def setup():
  model = make()
  return model, random_params(model), batch_of(model, (2, 4))['tokens']


def test_greedy_equals_appending_the_likeliest_token(setup):
  model, params, prompt = setup
  got = generate(model, params, prompt, 3, jax.random.key(2), temperature=0.0)
  expected = prompt
  for _ in range(3):
    token = jax.jit(model.logits)(params, expected)[:, -1].argmax(-1)
    expected = jnp.concatenate([expected, token[:, None].astype(jnp.int32)], axis=1)
  np.testing.assert_array_equal(got, expected)


def test_noise_belongs_to_the_position(setup):
  model, params, prompt = setup
  draw = lambda length, seed: generate(model, params, prompt, length, jax.random.key(seed), 1.0)
  longer = draw(5, 0)
  np.testing.assert_array_equal(longer[:, :7], draw(3, 0))
  np.testing.assert_array_equal(longer[:, :4], prompt)
  assert not np.array_equal(longer, draw(5, 1))


def test_samples_follow_the_temperature_and_top_k():
  logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
  count = 4000
  rows = jnp.tile(logits[None], (count, 1))

  def frequencies(temperature, top_k):
    drawn = sample(rows, jax.random.key(0), temperature, top_k)
    return np.bincount(drawn, minlength=4) / count

  # Five standard errors of a frequency over 4000 draws, at most 0.04.
  np.testing.assert_allclose(frequencies(1.0, None), [0.1, 0.2, 0.3, 0.4], atol=0.04)
  np.testing.assert_allclose(frequencies(0.5, 2), [0, 0, 9 / 25, 16 / 25], atol=0.04)
  np.testing.assert_array_equal(frequencies(0.0, None), [0, 0, 0, 1])


def test_impossible_requests_are_refused(setup):
  model, params, prompt = setup
  with pytest.raises(ValueError, match='top_k 0'):
    generate(model, params, prompt, 1, jax.random.key(0), top_k=0)
  with pytest.raises(ValueError, match='0 tokens'):
    generate(model, params, prompt[:, :0], 1, jax.random.key(0))
