"""Sampling text from a model.

Shapes in this file: `B` prompts of `P` tokens each, continued to `P + length`; vocabulary `V`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=('model', 'length', 'top_k'))
def generate(
  model: Any,
  params: Any,
  prompt_tokens: jax.Array,
  length: int,
  key: jax.Array,
  temperature: float | jax.Array = 1.0,
  top_k: int | None = None,
) -> jax.Array:
  """Continues prompts by sampling, as one compiled program.

  Runs the whole sequence through the model for every new token: `length (P + length)` tokens of
  work a prompt, and no more memory than a forward pass. `memjax.models.decode` keeps keys and
  values instead, and runs each token once.

  Args:
    model: A model with `hidden_states` and `head_logits`, such as `memjax.models.Llama`.
    params: Its parameters.
    prompt_tokens: `i32[B, P]`, all prompts equally long, `P >= 1`.
    length: Tokens to add.
    key: The token at position `i` is drawn with `fold_in(key, i)`, so a longer run begins with a
      shorter one's text.
    temperature: Divides the logits; 0 takes the likeliest token.
    top_k: Draws among the `top_k` likeliest tokens only; None for all.

  Returns:
    `i32[B, P + length]`: prompts and what follows.

  Raises:
    ValueError: for an empty prompt, a negative `length`, or a `top_k` outside `1 .. V`.
  """
  batch, start = prompt_tokens.shape
  if start < 1 or length < 0:
    raise ValueError(f'Needs a prompt and length >= 0, got {start} tokens and length {length}.')
  if top_k is not None and not 1 <= top_k <= model.vocab:
    raise ValueError(f'top_k {top_k} is not between 1 and the vocabulary size {model.vocab}.')

  def add_token(position, tokens):
    # Later places of the buffer hold zeros; causal attention keeps them out of sight.
    x = model.hidden_states(params, tokens)
    last = jax.lax.dynamic_slice_in_dim(x, position - 1, 1, axis=1)
    logits = model.head_logits(params, last)[:, 0]
    token = sample(logits, jax.random.fold_in(key, position), temperature, top_k)
    return jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1)

  tokens = jnp.zeros((batch, start + length), jnp.int32).at[:, :start].set(prompt_tokens)
  return jax.lax.fori_loop(start, start + length, add_token, tokens)


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
