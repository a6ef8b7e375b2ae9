"""Cross-entropy over a large vocabulary, a few tokens at a time.

Shapes in this file: hidden states `[B, T, D]`, vocabulary `V`; the sequence is cut into `n` chunks
of `t` tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def chunked_cross_entropy(
  project: Callable[[jax.Array], jax.Array],
  x: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  chunk: int,
) -> tuple[jax.Array, jax.Array]:
  """Sums the cross-entropy of all tokens without ever holding `f32[B, T, V]`, forward or backward.

  Holds logits of `B t` tokens, `4 B t V` bytes, and computes them twice: the backward pass makes
  each chunk's again. The cut is along time, so a batch sharded over devices stays where it is and
  no hidden states move. The gradient of what `project` closes over is summed over chunks in that
  leaf's own dtype.

  Args:
    project: Maps hidden states `[B, t, D]` to logits `[B, t, V]`.
    x: Hidden states `[B, T, D]`.
    targets: Next tokens `i32[B, T]`; any value where the weight is 0.
    weights: `f32[B, T]`; 0 for tokens that do not count.
    chunk: Tokens `t` of each sequence whose logits exist at once. At most half the sequence, so
      that there are always two chunks and the peak is never the naive one.

  Returns:
    `(sum f32[], count f32[])`: the weighted sum of losses, in nats, and the sum of weights.
  """
  length = x.shape[1]
  chunk = min(chunk, max(1, -(-length // 2)))
  number = -(-length // chunk)
  chunk = -(-length // number)  # Even chunks: the last one is padded least.

  def cut(a):
    """Returns `[n, B, t, ...]`, padded with zeros: a padded token has weight 0."""
    pad = [(0, 0), (0, number * chunk - length)] + [(0, 0)] * (a.ndim - 2)
    a = jnp.pad(a, pad).reshape(a.shape[0], number, chunk, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0)

  # prevent_cse=False: a scan body cannot be merged with its own rematerialisation, so no barrier is
  # needed.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def chunk_sum(x, targets, weights):
    return jnp.sum(weights * cross_entropy(project(x), targets))

  weights = weights.astype(jnp.float32)
  sums = jax.lax.map(lambda part: chunk_sum(*part), (cut(x), cut(targets), cut(weights)))
  return jnp.sum(sums), jnp.sum(weights)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Returns the cross-entropy `f32[B, T]` of logits `[B, T, V]`, in nats."""
  logits = logits.astype(jnp.float32)
  # A comparison and a sum instead of a gather: they stay local when the vocabulary is sharded,
  # forward and backward.
  vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
  chosen = jnp.where(vocabulary == targets[..., None], logits, 0)
  return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(chosen, axis=-1)
