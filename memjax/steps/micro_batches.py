"""Micro-batches: parts of a batch that take turns.

Shapes in this file: a batch has leaves `[B, ...]`, its `A` micro-batches together `[A, B/A, ...]`.
With `A = 1` there is no loop and no leading axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split(batch: Any, number: int) -> Any:
  """Cuts a batch: rows `i::number` form micro-batch `i`, so that every device keeps its own rows
  and nothing moves.
  """
  if number == 1:
    return batch
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0] // number, number, *x.shape[1:]).swapaxes(0, 1), batch
  )


def accumulate(function: Callable, parts: Any, number: int, only: Any = None) -> tuple[Any, Any]:
  """Calls `function(part, index) -> (summed, kept)` on each micro-batch.

  Args:
    function: Its first result is added up in f32, its second collected; `index` is the number of
      the micro-batch, see `memjax.weights.in_part`.
    parts: What `split` returned.
    number: Micro-batches.
    only: The number of the only one, where a loop around it has others.

  Returns:
    The sums, which have the function's own dtypes for a single micro-batch; and what was kept,
    `[A, ...]` for more than one.
  """
  if number == 1:
    return function(parts, only)

  def add(total, indexed):
    summed, kept = function(*indexed)
    return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, summed), kept

  summed, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), 0)
  zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), summed)
  return jax.lax.scan(add, zeros, (parts, jnp.arange(number)))
