"""How likely a decoder finds what follows a prompt.

Shapes in this file: `B` rows of `T` tokens, an option of at most `O` of them; vocabulary `V`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memjax.models.cross_entropy import cross_entropy
from memjax.tasks import prompts
from memjax.tasks.task import Example


@functools.partial(jax.jit, static_argnames=('model', 'width'))
def log_likelihood(
  model: Any, params: Any, batch: dict[str, jax.Array], width: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the summed log-probability of each row's option, and its tokens.

  Only the option's places reach the head: logits take `4 B O V` bytes.

  Args:
    model: A model with `hidden_states` and `head_logits`, such as `memjax.models.Llama`.
    params: Its parameters.
    batch: `tokens` and `targets` `i32[B, T]`, `weights` `f32[B, T]`: 1 at the places of the
      option, which lie together.
    width: `O`, at least the longest option of the batch.

  Returns:
    `(sum f32[B], count f32[B])`.
  """
  x = model.hidden_states(params, batch['tokens'])
  first = jnp.argmax(batch['weights'] > 0, axis=1)
  places = jnp.minimum(first[:, None] + jnp.arange(width)[None], x.shape[1] - 1)
  # A short row beside the end would count its last place again.
  counted = first[:, None] + jnp.arange(width)[None] < x.shape[1]
  x = jnp.take_along_axis(x, places[:, :, None], axis=1)
  targets = jnp.take_along_axis(batch['targets'], places, axis=1)
  weights = jnp.take_along_axis(batch['weights'], places, axis=1) * counted
  losses = cross_entropy(model.head_logits(params, x), targets)
  return everywhere(model, (-jnp.sum(weights * losses, axis=1), jnp.sum(weights, axis=1)))


def everywhere(model: Any, values: Any) -> Any:
  """Returns small values on every device of the mesh that the model's activations are spread over,
  so that each process can read all of them.
  """
  if model.activations is None:
    return values
  return jax.lax.with_sharding_constraint(values, NamedSharding(model.activations.mesh, P()))


def option_scores(
  score: Callable[[dict, int], tuple],
  prompter: prompts.Prompter,
  examples: Sequence[Example],
  batch_size: int,
  *,
  stop: Callable[[], bool] = lambda: False,
) -> list[np.ndarray] | None:
  """Returns the score of every option of every example.

  Options are rows: a batch may hold the options of several examples, and part of one's. Rows are
  padded to a power of two or the longest allowed, so that there are few programs to compile.

  Args:
    score: `score(batch, width)` returns sums and counts as `log_likelihood` does.
    prompter: Encodes examples.
    examples: Each with its own number of options.
    batch_size: Rows at a time.
    stop: Asked before every batch; when it says yes, None is returned.

  Returns:
    For each example, `f64[options]`: the mean log-probability a token of each option, or the sum
    where the task's `lengths` is off.
  """
  rows = [(e, o) for e in range(len(examples)) for o in range(len(examples[e].options))]
  encoded = [prompter.row(examples[e], o) for e, o in rows]
  # Rows of a like length share a batch.
  near = sorted(range(len(rows)), key=lambda i: len(encoded[i].tokens))
  scores = [np.zeros(len(e.options)) for e in examples]
  for start in range(0, len(near), batch_size):
    if stop():
      return None
    chosen = near[start : start + batch_size]
    padded = [encoded[i] for i in chosen] + [None] * (batch_size - len(chosen))
    length = rounded(max(len(encoded[i].tokens) for i in chosen) - 1, prompter.length - 1)
    width = rounded(max(encoded[i].option for i in chosen), length, least=1)
    total, count = score(prompts.pad(padded, length), width)
    mean = np.asarray(count if prompter.task.lengths else np.ones_like(count), np.float64)
    for place, i in enumerate(chosen):
      example, option = rows[i]
      scores[example][option] = total[place] / mean[place]
  return scores


def rounded(length: int, most: int, least: int = 16) -> int:
  """Returns the next power of two, but no more than `most`."""
  return min(max(least, 1 << (length - 1).bit_length()), most)
