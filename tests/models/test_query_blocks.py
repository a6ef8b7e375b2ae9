"""Attention in blocks of queries against all queries at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close

from memjax.models.query_blocks import attention

WHOLE = 2**40  # Bytes of scores: more than any test has.


def draw(length, heads=4, kv_heads=2, dtype='float32'):
  rng = np.random.default_rng(0)
  make = lambda n: jnp.asarray(rng.standard_normal((2, length, n, 8)), dtype)
  return make(heads), make(kv_heads), make(kv_heads), make(heads)


def results(scores, arrays, mask=None):
  """Outputs, and gradients of queries, keys and values."""
  *inputs, cotangent = arrays
  y, pull_back = jax.vjp(lambda *qkv: attention(*qkv, mask, scores), *inputs)
  return [y, *pull_back(cotangent)]


def left_padding(length):
  """Of two sequences, one whole, one with three tokens of padding in front."""
  return jnp.arange(length)[None, :] >= jnp.array([[0], [3]])


# Blocks of 4 of 16 queries; of 5 and 3 of 13, the last padded; of one query.
@pytest.mark.parametrize(('length', 'size'), [(16, 4), (13, 5), (6, 1)])
@pytest.mark.parametrize('padded', [False, True])
def test_values_and_gradients_are_those_of_the_whole(length, size, padded):
  arrays = draw(length)
  mask = left_padding(length) if padded else None
  scores = 4 * 4 * size * length
  # f32 sums in another order.
  assert_trees_close(results(scores, arrays, mask), results(WHOLE, arrays, mask), 1e-6)


def test_a_query_reads_earlier_tokens_that_are_no_padding():
  """Against numpy, a softmax a row."""
  query, key, value, _ = draw(16, heads=4, kv_heads=4)
  mask = np.asarray(left_padding(16))
  found = np.asarray(attention(query, key, value, jnp.asarray(mask), 4 * 4 * 4 * 16))
  q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
  for row in range(3, 16):  # Of padding nothing is promised.
    seen = mask[1] & (np.arange(16) <= row)
    logits = np.einsum('nh,snh->ns', q[1, row], k[1, seen]) / np.sqrt(8)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    expected = np.einsum('ns,snh->nh', odds / odds.sum(-1, keepdims=True), v[1, seen])
    np.testing.assert_allclose(found[1, row], expected, atol=1e-5)


@pytest.mark.parametrize('window', [1, 5])
def test_blocks_keep_to_the_window(window):
  *arrays, _ = draw(13)
  whole = attention(*arrays, scores=WHOLE, window=window)
  blocks = attention(*arrays, scores=4 * 4 * 5 * 13, window=window)
  np.testing.assert_allclose(blocks, whole, atol=1e-6)
  if window == 1:  # A token reads itself alone.
    np.testing.assert_allclose(whole, np.repeat(arrays[2], 2, axis=2), atol=1e-6)


@pytest.mark.slow
def test_gradients_of_keys_are_summed_in_float32():
  """bfloat16 sums over 64 blocks would be off by more than one rounding."""
  arrays = draw(64, dtype='bfloat16')
  exact = results(WHOLE, [x.astype(jnp.float32) for x in arrays])[2:]
  in_blocks = results(4 * 4 * 64, arrays)[2:]
  whole = results(WHOLE, arrays)[2:]
  off = lambda found: max(
    float(jnp.abs(x.astype(jnp.float32) - y).max()) for x, y in zip(found, exact)
  )
  assert off(in_blocks) <= 1.1 * off(whole)


def test_scores_of_one_block_exist_at_once():
  length, size = 512, 32
  arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(length)]

  def temporary(scores):
    compiled = jax.jit(lambda *arrays: results(scores, arrays)).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  whole = 4 * 2 * 4 * length**2  # B = 2 sequences, N = 4 heads.
  assert temporary(WHOLE) > whole
  assert temporary(4 * 4 * size * length) < whole / 2
