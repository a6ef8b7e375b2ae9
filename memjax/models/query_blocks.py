"""Attention that holds the scores of a block of queries at a time.

Shapes in this file: `B` sequences of `T` tokens, `N` query heads and `K` key-value heads of width
`H`; queries are cut into `n` blocks of `t`.
"""

import functools

import jax
import jax.numpy as jnp

SCORES = 64 * 2**20  # Bytes of scores that one sequence may have at once: T = 724 for 32 heads.


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  scores: int = SCORES,
  causal: bool = True,
  window: int | None = None,
) -> jax.Array:
  """Returns what the heads read from other tokens, `[B, T, N, H]`.

  Holds `4 B N t T` bytes of scores, a small multiple of it in the backward pass, where the whole
  takes `4 B N T T`. Blocks are used where the whole is more than `scores` bytes a sequence, and
  are as few as keep to it. Time: the backward pass forms each block's scores again, `2 N T T H`
  operations a sequence, as flash attention does. Communicates nothing: batch and heads, the axes
  that meshes divide, stay where they are.

  Args:
    query: `[B, T, N, H]`.
    key: `[B, T, K, H]`.
    value: `[B, T, K, H]`.
    mask: `bool[B, T]`, tokens that may be attended to; None for all.
    scores: Most bytes of f32 scores of one sequence.
    causal: Whether a token attends to earlier ones and itself only.
    window: Tokens that one reads at most, itself and those before it, where it is causal.

  References:
    Rabe and Staats, `Self-attention Does Not Need O(n^2) Memory
    <https://arxiv.org/abs/2112.05682>`_, 2021 (cuts keys too)
  """
  length, heads = query.shape[1:3]
  mask = None if mask is None else mask[:, None, None, :]
  number = min(-(-4 * heads * length**2 // scores), length)
  if number <= 1:
    return jax.nn.dot_product_attention(
      query,
      key,
      value,
      mask=mask,
      is_causal=causal,
      local_window_size=None if window is None else (window - 1, 0),
      implementation='xla',
    )
  size = -(-length // number)

  # prevent_cse=False: a scan body cannot be merged with its own rematerialisation, so no barrier is
  # needed.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def attend(first, query, key, value):
    allowed = mask
    if causal:
      rows = first + jnp.arange(size)
      before = rows[:, None] - jnp.arange(length)[None, :]
      allowed = (before >= 0) if window is None else (before >= 0) & (before < window)
      allowed = allowed[None, None]
      allowed = allowed if mask is None else allowed & mask
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return jax.nn.dot_product_attention(query, key, value, mask=allowed, implementation='xla')

  # In f32, so that their gradients are summed over blocks in f32.
  key, value = key.astype(jnp.float32), value.astype(jnp.float32)
  starts = size * jnp.arange(number)
  y = jax.lax.map(lambda part: attend(*part, key, value), (starts, _cut(query, number, size)))
  return jnp.moveaxis(y, 0, 1).reshape(query.shape[0], number * size, *query.shape[2:])[:, :length]


def _cut(query: jax.Array, number: int, size: int) -> jax.Array:
  """Returns `[n, B, t, N, H]`, padded with zeros: what a padded query reads is dropped."""
  batch, length, *rest = query.shape
  query = jnp.pad(query, [(0, 0), (0, number * size - length), (0, 0), (0, 0)])
  return jnp.moveaxis(query.reshape(batch, number, size, *rest), 1, 0)
