"""Decoding with a cache gives what running the whole sequence for every token gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from memjax.models import create
from memjax.models.decode import decode
from memjax.models.generate import generate

SMALL = dict(vocab=40, hidden=16, intermediate=24, heads=2, layers=2)
MODELS = {
  'llama': lambda: create('llama_tiny', **SMALL, kv_heads=1),
  'window': lambda: create('llama_tiny', **SMALL, kv_heads=1, window=3),
  'opt': lambda: create('opt_tiny', **SMALL, positions=16),
  'phi': lambda: create('phi_tiny', **SMALL),
}
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize('name', ['window', 'opt', slow('phi'), slow('llama')])
def test_greedy_tokens_are_those_of_whole_sequences_wherever_the_padding(name):
  model = MODELS[name]()
  params = random_params(model)
  prompts = np.random.default_rng(1).integers(0, model.vocab, (3, 5), dtype=np.int32)
  expected = generate(model, params, jnp.asarray(prompts), 6, jax.random.key(0), 0.0)[:, 5:]
  assert len(np.unique(expected)) > 3  # Text that says something.
  tokens, mask = np.full((3, 7), 7, np.int32), np.zeros((3, 7), np.int32)
  for start, prompt in enumerate(prompts):
    tokens[start, start : start + 5] = prompt
    mask[start, start : start + 5] = 1
  got = decode(model, params, tokens, 6, jax.random.key(0), 0.0, attention_mask=mask)
  np.testing.assert_array_equal(got, expected)


@pytest.fixture(scope='module')
def llama():
  model = MODELS['llama']()
  return model, random_params(model), jnp.arange(8, dtype=jnp.int32).reshape(2, 4)


def test_sampled_tokens_are_generates(llama):
  model, params, prompt = llama
  key = jax.random.key(3)
  expected = generate(model, params, prompt, 6, key, 0.7, 5)[:, 4:]
  np.testing.assert_array_equal(decode(model, params, prompt, 6, key, 0.7, 5), expected)


def test_a_row_stops_at_its_token_and_repeats_it(llama):
  model, params, prompt = llama
  run = lambda stop: np.asarray(
    decode(model, params, prompt, 6, jax.random.key(0), 0.0, stop=jnp.asarray(stop))
  )
  free = run([98, 99])  # Beyond the vocabulary, to compile once.
  first = free[0, 1]
  got = run([first, 99])
  for row, whole in zip(got, free):
    places = np.flatnonzero(whole == first)
    end = places[0] if len(places) else len(whole)
    np.testing.assert_array_equal(row[: end + 1], whole[: end + 1])
    assert (row[end:] == first).all()
  assert (got[0, 1:] == first).all()


def test_the_cache_is_updated_in_place(llama):
  model, params, prompt = llama
  # Two slots a token of one layer beside the cache: its copy would need 2 L times as many.
  compiled = (
    jax.jit(lambda params, prompt: decode(model, params, prompt, 2000, jax.random.key(0), 0.0))
    .lower(params, prompt)
    .compile()
  )
  cache = 2 * model.layers * 2 * (2000 + 4) * model.kv_heads * model.head_dim * 4
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert cache < temporaries < 2.6 * cache


def test_impossible_requests_are_refused(llama):
  model, params, prompt = llama
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='top_k 0'):
    decode(model, params, prompt, 1, key, top_k=0)
  with pytest.raises(ValueError, match='0 tokens'):
    decode(model, params, prompt[:, :0], 1, key)
  opt = MODELS['opt']()
  with pytest.raises(ValueError, match='13 more, but the model has 16 positions'):
    decode(opt, random_params(opt), prompt, 13, key)
  assert decode(model, params, prompt, 0, key).shape == (2, 0)
