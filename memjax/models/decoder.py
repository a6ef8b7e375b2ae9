"""What language models of any family share: the head's loss, and how the pieces compose.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, vocabulary `V`, `L` layers.
"""

import jax
import jax.numpy as jnp

from memjax.models.cross_entropy import chunked_cross_entropy
from memjax.models.layout import sum_over_batch
from memjax.models.stacked import Params, Stacked


class Decoder(Stacked):
  """Pure functions of the parameters of a language model, over methods that a family provides.

  A family is what `Stacked` says, with the field `loss_chunk` and the pieces `embed` and
  `hidden_states` besides.
  """

  # The third piece, after the family's `embed` and `block`.

  def head_loss(
    self, params: Params, x: jax.Array, targets: jax.Array, weights: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the summed cross-entropy and the count of tokens.

    Never holds logits of more than `loss_chunk` tokens a device; see `memjax.models.cross_entropy`.

    Args:
      params: Read for what belongs to the head only (`embed` when tied).
      x: Hidden states `[B, T, D]` after the last block.
      targets: Next tokens `i32[B, T]`.
      weights: `f32[B, T]`; 0 for tokens that do not count.

    Returns:
      `(sum f32[], count f32[])`; the loss is their quotient, taken once, after summing over
      everything.
    """

    def token_losses(head, x, targets, weights):
      chunk = max(1, self.loss_chunk // x.shape[0])
      return chunked_cross_entropy(self._head(head), x, targets, weights, chunk)

    return sum_over_batch(token_losses, self.activations)(
      self._head_params(params), x, targets, weights
    )

  # Their compositions.

  def loss(self, params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the summed cross-entropy and the count of tokens, as `head_loss` does.

    Args:
      params: Parameters.
      batch: `tokens` and `targets` `i32[B, T]`, `weights` `f32[B, T]`.
    """
    x = self.blocks(params['blocks'], self.embed(params, batch['tokens']))
    return self.head_loss(params, x, batch['targets'], batch['weights'])

  def head_logits(self, params: Params, x: jax.Array) -> jax.Array:
    """Returns logits `f32[B, T, V]` of hidden states `[B, T, D]`."""
    return self._head(self._head_params(params))(x).astype(jnp.float32)

  def logits(
    self, params: Params, tokens: jax.Array, attention_mask: jax.Array | None = None
  ) -> jax.Array:
    """Returns logits for every position.

    Args:
      params: Parameters.
      tokens: `i32[B, T]`.
      attention_mask: `[B, T]`, nonzero for tokens and zero for padding on either side; real tokens
        then get the logits they have without padding, and those of padding mean nothing.

    Returns:
      Logits `f32[B, T, V]`, all of them: `4 B T V` bytes. To train, use `loss`.
    """
    return self.head_logits(params, self.hidden_states(params, tokens, attention_mask))


def padding(attention_mask: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
  """Returns positions `i32[B, T]` and which tokens may be attended to, `bool[B, T]`; None for None.

  A sequence's first real token is at position 0, wherever its padding is.
  """
  if attention_mask is None:
    return None, None
  mask = attention_mask.astype(bool)
  return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0), mask
