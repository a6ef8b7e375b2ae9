"""Training a decoder as a classifier among the words of a task.

Shapes in this file: `B` examples with `K` options each, rows of `T` tokens; vocabulary `V`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memjax.models.cross_entropy import cross_entropy
from memjax.tasks.scoring import log_likelihood

OPTION_TOKENS = 16  # The most an option may have, so that few places reach the head.


@dataclasses.dataclass(frozen=True)
class Choosing:
  """A decoder whose loss is the cross-entropy of the right option among all.

  An option's score is the mean log-probability of its tokens, as in MeZO's classification; the
  loss of a decoder itself is that of the right option's tokens among the vocabulary. All else is
  the decoder's. A step runs `B K` rows, and its logits take `64 B K V` bytes.

  Attributes:
    decoder: The model.
    options: `K`.
    lengths: Whether scores are means over tokens; else sums.

  References:
    Malladi et al., `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, 2023
  """

  decoder: Any
  options: int
  lengths: bool = True

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__') or name == 'decoder':  # Of a copy that is not yet filled in.
      raise AttributeError(name)
    return getattr(self.decoder, name)

  def loss(self, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the summed cross-entropy over options, in nats, and the count of examples.

    Args:
      params: Parameters of the decoder.
      batch: As `batch_shapes` says.
    """
    rows = {k: batch[k].reshape(-1, batch[k].shape[2]) for k in ('tokens', 'targets', 'places')}
    rows['weights'] = rows.pop('places')
    width = min(OPTION_TOKENS, rows['tokens'].shape[1])
    total, count = log_likelihood(self.decoder, params, rows, width)
    scores = total / jnp.maximum(count, 1) if self.lengths else total
    losses = cross_entropy(scores.reshape(-1, 1, self.options), batch['labels'][:, None])[:, 0]
    return jnp.sum(losses * batch['weights']), jnp.sum(batch['weights'])

  def batch_shapes(self, batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch as shapes: `tokens`, `targets` i32[B, K, T]; `places` f32[B, K, T], 1 at the
    tokens of options; `labels` i32[B]; `weights` f32[B], 0 for examples that fill the batch up.
    """
    shape = (batch, self.options, length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return {
      'tokens': tokens,
      'targets': tokens,
      'places': jax.ShapeDtypeStruct(shape, jnp.float32),
      'labels': jax.ShapeDtypeStruct((batch,), jnp.int32),
      'weights': jax.ShapeDtypeStruct((batch,), jnp.float32),
    }
