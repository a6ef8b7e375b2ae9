"""Decoders whose positions are rotations within attention: LLaMA, Phi.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`.
"""

import jax
import jax.numpy as jnp

from memjax.models.decoder import Decoder, padding
from memjax.models.layout import spread_lookup
from memjax.models.module import bind
from memjax.models.stacked import Params


class RotaryDecoder(Decoder):
  """What such families share: pieces over blocks that take positions and a mask."""

  def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
    """Embeds tokens `i32[B, T]` as hidden states `[B, T, D]`; reads `params['embed']` only."""
    embed = bind(self.modules()[0], params['embed'])
    return spread_lookup(embed(tokens).astype(self.dtype), self.activations)

  def block(
    self,
    layer: Params,
    x: jax.Array,
    positions: jax.Array | None = None,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Applies one block.

    Args:
      layer: One layer of `params['blocks']`: the same dict without the leading axis.
      x: Hidden states `[B, T, D]`.
      positions: Rotary positions `i32[B, T]`; default `0 .. T - 1`.
      mask: `bool[B, T]`, tokens that may be attended to; default all.

    Returns:
      Hidden states `[B, T, D]`.
    """
    if positions is None:
      positions = jnp.arange(x.shape[1])[None, :]
    return self._constrain(bind(self.modules()[1], layer)(x, positions, mask))

  def hidden_states(
    self, params: Params, tokens: jax.Array, attention_mask: jax.Array | None = None
  ) -> jax.Array:
    """Returns hidden states `[B, T, D]` after the last block; arguments as in `logits`."""
    positions, mask = padding(attention_mask)
    return self.blocks(params['blocks'], self.embed(params, tokens), positions, mask)
