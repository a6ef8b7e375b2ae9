"""Decoding with a cache gives what running the whole sequence for every token gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

from memjax.models import create
from memjax.models.decode import decode, sample

SMALL = dict(vocab=40, hidden=16, intermediate=24, heads=2, layers=2)
MODELS = {
  'llama': lambda: create('llama_tiny', **SMALL, kv_heads=1),
  'window': lambda: create('llama_tiny', **SMALL, kv_heads=1, window=3),
  'opt': lambda: create('opt_tiny', **SMALL, positions=16),
  'phi': lambda: create('phi_tiny', **SMALL),
}
NONE = (98, 99)  # Beyond the vocabulary: nothing stops.
slow = lambda name: pytest.param(name, marks=pytest.mark.slow)


@functools.cache
def made(name):
  model = MODELS[name]()
  return model, random_params(model)


def run(name, tokens, mask, *, stop=NONE, key=0, temperature=0.0):
  """Always in one shape, to compile once a model."""
  key, stop = jax.random.key(key), jnp.asarray(stop, jnp.int32)
  rest = dict(attention_mask=jnp.asarray(mask), stop=stop)
  return np.asarray(decode(*made(name), jnp.asarray(tokens), 6, key, temperature, **rest))


def whole_sequences(name, tokens, key=0, temperature=0.0):
  """The slow obvious loop: all tokens again for every new one; in one shape, zeros to come."""
  model, params = made(name)
  logits = jax.jit(model.logits)
  start = tokens.shape[1]
  tokens = np.pad(tokens, ((0, 0), (0, 6)))
  for place in range(start, start + 6):
    last = logits(params, jnp.asarray(tokens))[:, place - 1]
    key_here = jax.random.fold_in(jax.random.key(key), place)
    tokens[:, place] = sample(last, key_here, temperature, None)
  return tokens[:, start:]


def prompts(name, length):
  vocab = made(name)[0].vocab
  return np.random.default_rng(1).integers(0, vocab, (3, length), dtype=np.int32)


@pytest.mark.parametrize('name', ['window', 'opt', slow('phi'), slow('llama')])
def test_greedy_tokens_are_those_of_whole_sequences_wherever_the_padding(name):
  rows = prompts(name, 5)
  expected = whole_sequences(name, rows)
  assert len(np.unique(expected)) > 3  # Text that says something.
  tokens, mask = np.full((3, 7), 7, np.int32), np.zeros((3, 7), np.int32)
  for start, row in enumerate(rows):
    tokens[start, start : start + 5] = row
    mask[start, start : start + 5] = 1
  np.testing.assert_array_equal(run(name, tokens, mask), expected)


def test_noise_belongs_to_the_position():
  tokens = prompts('window', 7)
  expected = whole_sequences('window', tokens, key=3, temperature=0.7)
  got = run('window', tokens, np.ones_like(tokens), key=3, temperature=0.7)
  np.testing.assert_array_equal(got, expected)
  other = run('window', tokens, np.ones_like(tokens), key=4, temperature=0.7)
  assert not np.array_equal(other, expected)
  shorter = decode(*made('window'), jnp.asarray(tokens), 3, jax.random.key(3), 0.7)
  np.testing.assert_array_equal(shorter, expected[:, :3])


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


def test_a_row_stops_at_its_token_and_repeats_it():
  tokens = prompts('window', 7)
  mask = np.ones_like(tokens)
  free = run('window', tokens, mask)
  first = free[0, 1]
  got = run('window', tokens, mask, stop=(first, 99))
  for row, whole in zip(got, free):
    places = np.flatnonzero(whole == first)
    end = places[0] if len(places) else len(whole)
    np.testing.assert_array_equal(row[: end + 1], whole[: end + 1])
    assert (row[end:] == first).all()
  assert (got[0, 1:] == first).all()
  assert (got != free).any()


def test_the_cache_is_updated_in_place():
  model = create('llama_tiny', **SMALL | {'layers': 6}, kv_heads=1)
  long = functools.partial(decode, model, length=2000, key=jax.random.key(0), temperature=0.0)
  prompt = jnp.zeros((2, 4), jnp.int32)
  step = jax.jit(lambda params, prompt: long(params, prompt))
  compiled = step.lower(model.abstract(), prompt).compile()
  cache = 2 * model.layers * 2 * (2000 + 4) * model.kv_heads * model.head_dim * 4
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  # One layer of six is held beside it, with its new token. A copy of all would make it two.
  assert cache < temporaries < 1.25 * cache


def test_impossible_requests_are_refused():
  model, params = made('llama')
  prompt, key = jnp.zeros((2, 4), jnp.int32), jax.random.key(0)
  with pytest.raises(ValueError, match='top_k 0'):
    decode(model, params, prompt, 1, key, top_k=0)
  with pytest.raises(ValueError, match='0 tokens'):
    decode(model, params, prompt[:, :0], 1, key)
  with pytest.raises(ValueError, match='13 more, but the model has 16 positions'):
    decode(*made('opt'), prompt, 13, key)
  assert decode(model, params, prompt, 0, key).shape == (2, 0)
