"""Continuing prompts of any length with a cache of keys and values.

Shapes in this file: `B` prompts of at most `P` tokens, continued by `length`, in `S = P + length`
slots; `L` layers, `K` key-value heads of width `H`; vocabulary `V`.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from memjax.models.cache import Cache
from memjax.models.decoder import padding


@functools.partial(jax.jit, static_argnames=('model', 'length', 'top_k'))
def decode(
  model: Any,
  params: Any,
  prompt_tokens: jax.Array,
  length: int,
  key: jax.Array,
  temperature: float | jax.Array = 1.0,
  top_k: int | None = None,
  *,
  attention_mask: jax.Array | None = None,
  stop: jax.Array | None = None,
) -> jax.Array:
  """Continues prompts by sampling, as one compiled program that runs each token once.

  Keeps `2 L B S K H` numbers in the model's dtype beside the parameters, updated in place, and
  those of one layer again while it is read. Ends as soon as every row has stopped.

  Args:
    model: A decoder, such as `memjax.models.Llama`.
    params: Its parameters.
    prompt_tokens: `i32[B, P]`.
    length: Tokens to add at most.
    key: The token that follows `P + i` others is drawn with `fold_in(key, P + i)`, so a longer text
      begins with a shorter one from the same key.
    temperature: Divides the logits; 0 takes the likeliest token.
    top_k: Draws among the `top_k` likeliest tokens only; None for all.
    attention_mask: `[B, P]`, zero for padding, on either side; every row has a token. Default: no
      padding.
    stop: `i32[s]`, tokens after which a row stops; default none.

  Returns:
    `i32[B, length]`: what follows each prompt. A row that stops repeats the token it stopped with.

  Raises:
    ValueError: for an empty prompt, a negative `length`, more tokens than the model has positions,
      or a `top_k` outside `1 .. V`.
  """
  batch, start = prompt_tokens.shape
  _check(model, start, length, top_k)
  if length == 0:
    return jnp.zeros((batch, 0), jnp.int32)
  mask = jnp.ones((batch, start), bool)
  if attention_mask is not None:
    # Padding goes to the left, so that the next token has one slot in all rows.
    order = jnp.argsort(attention_mask != 0, axis=1, stable=True)
    mask = jnp.take_along_axis(attention_mask != 0, order, axis=1)
    prompt_tokens = jnp.take_along_axis(prompt_tokens, order, axis=1)
  stop = jnp.zeros(0, jnp.int32) if stop is None else stop
  positions, _ = padding(mask)
  allowed = jnp.concatenate([mask, jnp.ones((batch, length), bool)], axis=1)
  shape = (model.layers, batch, start + length, model.kv_heads, model.head_dim)
  cache = (jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))

  def next_token(x, index):
    logits = model.head_logits(params, x[:, -1:])[:, 0]
    return sample(logits, jax.random.fold_in(key, start + index), temperature, top_k)

  x, cache = _forward(model, params, prompt_tokens, positions, cache, allowed, None)
  token = next_token(x, 0)
  tokens = jnp.broadcast_to(token[:, None], (batch, length))

  def unfinished(state):
    index, _, done, _ = state
    return (index < length) & ~jnp.all(done)

  def add_token(state):
    index, tokens, done, cache = state
    last = jax.lax.dynamic_slice_in_dim(tokens, index - 1, 1, axis=1)
    x, cache = _forward(
      model, params, last, positions[:, -1:] + index, cache, allowed, start + index - 1
    )
    token = jnp.where(done, last[:, 0], next_token(x, index))
    # Over all places to come, which is what a row that stops here is to hold.
    coming = jnp.arange(length)[None] >= index
    tokens = jnp.where(coming, token[:, None], tokens)
    return index + 1, tokens, done | _among(token, stop), cache

  state = (jnp.int32(1), tokens, _among(token, stop), cache)
  return jax.lax.while_loop(unfinished, add_token, state)[1]


def sample(
  logits: jax.Array, key: jax.Array, temperature: float | jax.Array, top_k: int | None
) -> jax.Array:
  """Draws token ids `i32[B]` from logits `f32[B, V]`; temperature 0 takes the likeliest."""
  if top_k is not None:
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  temperature = jnp.asarray(temperature, jnp.float32)
  drawn = jax.random.categorical(key, logits / jnp.where(temperature == 0, 1, temperature))
  return jnp.where(temperature == 0, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def _forward(model, params, tokens, positions, cache, allowed, slot):
  """Returns hidden states `[B, t, D]` after the last block, and the cache with these tokens in it.

  Layers only read the cache, and what all of them leave goes in at once: a cache that is carried
  through their loop is copied before it.
  """
  x = _call(model.embed, params, tokens, positions=positions)

  def block(x, part):
    layer, keys, values = part
    here = Cache(keys, values, allowed, slot)
    x = _call(model.block, layer, x, positions=positions, mask=here)
    return x, (here.key, here.value)

  x, left = jax.lax.scan(block, x, (params['blocks'], *cache))
  place = (0, 0, 0 if slot is None else slot, 0, 0)
  put = lambda whole, new: jax.lax.dynamic_update_slice(whole, new.astype(whole.dtype), place)
  return x, tuple(map(put, cache, left))


def _call(piece, *args, **named):
  """Calls `embed` or `block` with what it takes: positions belong to one of the two, by family."""
  taken = inspect.signature(piece).parameters
  return piece(*args, **{k: v for k, v in named.items() if k in taken})


def _among(token, stop):
  return jnp.any(token[:, None] == stop[None, :], axis=1)


def _check(model, start, length, top_k):
  if start < 1 or length < 0:
    raise ValueError(f'Needs a prompt and length >= 0, got {start} tokens and length {length}.')
  if top_k is not None and not 1 <= top_k <= model.vocab:
    raise ValueError(f'top_k {top_k} is not between 1 and the vocabulary size {model.vocab}.')
  most = getattr(model, 'positions', None)
  if most is not None and start + length > most:
    raise ValueError(
      f'a prompt of {start} tokens and {length} more, but the model has {most} positions; ask for '
      'fewer, or cut the front of the prompt.'
    )
