"""Heads of encoders: what is read from the hidden states of a sequence, and its loss.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, `n` labels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.models.cross_entropy import cross_entropy
from memjax.models.layers import Linear
from memjax.naming import nearest

# Name -> what the head gives.
TASKS = {
  'classification': 'a score for each label',
  'regression': 'a number',
  'span': 'a score for each token as first of a span, and as last',
  'embedding': 'a vector of norm 1, without parameters and without a loss',
}
POOLS = ('first', 'mean')


def check(task: str, pool: str) -> None:
  """Raises a `ValueError` for an unknown task or way to pool, with what is known."""
  if task not in TASKS:
    raise ValueError(f'no task of encoders is called {task!r}; {nearest(task, TASKS)}')
  if pool not in POOLS:
    raise ValueError(f'pool is {pool!r}, not one of {", ".join(POOLS)}')


class TaskLayers(nnx.Module):
  """The parameters of a head."""

  def __init__(self, c: Any):
    self.pooled, self.pool = c.task != 'span', c.pool
    self.dense_first = self.pooled and c.pool == 'first'
    if self.dense_first:
      self.dense = Linear(c.hidden, c.hidden, c.param_dtype, bias=True)
    outputs = {'classification': c.labels, 'regression': 1, 'span': 2}[c.task]
    self.out = Linear(c.hidden, outputs, c.param_dtype, bias=True)

  def __call__(self, x, mask):
    x = pool(x, mask, self.pool) if self.pooled else x
    x = jnp.tanh(self.dense(x)) if self.dense_first else x
    return self.out(x).astype(jnp.float32)


class Head(nnx.Module):
  """Hidden states `[B, T, D]` and mask `bool[B, T]` to what `memjax.models.Bert.logits` returns."""

  def __init__(self, c: Any):
    self.task, self.pool = c.task, c.pool
    if c.task != 'embedding':
      self.head = TaskLayers(c)

  def __call__(self, x, mask):
    if self.task == 'embedding':
      return normalise(pool(x, mask, self.pool).astype(jnp.float32))
    y = self.head(x, mask)
    if self.task == 'regression':
      return y[:, 0]
    if self.task == 'span':
      return jnp.where(mask[:, :, None], y, jnp.finfo(y.dtype).min)
    return y


def pool(x: jax.Array, mask: jax.Array, how: str) -> jax.Array:
  """Returns a vector for each sequence, `[B, D]`: its first token's, or the mean, summed in f32.

  Args:
    x: Hidden states `[B, T, D]`.
    mask: `bool[B, T]`, what is a token and not padding on either side.
    how: One of `POOLS`.
  """
  if how == 'first':
    # A comparison and a sum instead of a gather: local, forward and backward, on any mesh.
    first = jnp.arange(x.shape[1])[None, :] == jnp.argmax(mask, axis=1)[:, None]
    return jnp.sum(jnp.where(first[:, :, None], x, 0), axis=1)
  total = jnp.sum(jnp.where(mask[:, :, None], x, 0), axis=1, dtype=jnp.float32)
  count = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1)
  return (total / count[:, None]).astype(x.dtype)


def normalise(x: jax.Array) -> jax.Array:
  """Returns vectors `[B, D]` of norm 1; a vector of zeros stays."""
  square = jnp.sum(x * x, axis=1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def losses(task: str, logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns each sequence's loss, `f32[B]`.

  Args:
    task: A key of `TASKS`.
    logits: As `memjax.models.Bert.logits` returns them.
    labels: As `labels` describes them.

  Raises:
    ValueError: for a task without labels.
  """
  if task == 'embedding':
    raise ValueError(
      "task='embedding' has no labels and no loss; give the model a task with labels, "
      'such as classification, to train it'
    )
  if task == 'regression':
    return jnp.square(logits - labels.astype(jnp.float32))
  if task == 'span':
    return jnp.mean(cross_entropy(jnp.moveaxis(logits, 1, 2), labels), axis=1)
  return cross_entropy(logits, labels)


def labels(task: str, batch: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of a batch's labels."""
  shape = (batch, 2) if task == 'span' else (batch,)
  return jax.ShapeDtypeStruct(shape, jnp.float32 if task == 'regression' else jnp.int32)
