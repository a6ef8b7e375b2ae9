"""Decoders with a table of positions, layer norms and biases: OPT, GPT-2.

Shapes in this file: `B` sequences of `T` tokens, of at most `S`; hidden width `D`, width `E` of the
embedding, vocabulary `V`. Parameters are those of `memjax.models.opt`.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from memjax import weights
from memjax.models.attention import Attention
from memjax.models.decoder import Decoder, padding
from memjax.models.layers import MLP, Embed, LayerNorm, Linear
from memjax.models.layout import spread_lookup
from memjax.models.module import bind, declare
from memjax.models.stacked import Params, Stacked

# As `memjax.models.llama.SHARDING`; a bias lies as the columns of its matrix.
SHARDING = (
  (r'positions/embedding', P(None, 'fsdp')),
  (r'embed/embedding', P('tensor', 'fsdp')),
  (r'project_(in|out)/kernel', P('fsdp')),
  (r'blocks/attn/(q|k|v)/kernel', P(None, 'fsdp', 'tensor')),
  (r'blocks/attn/o/kernel', P(None, 'tensor', 'fsdp')),
  (r'blocks/mlp/up/kernel', P(None, 'fsdp', 'tensor')),
  (r'blocks/mlp/down/kernel', P(None, 'tensor', 'fsdp')),
  (r'blocks/(attn/(q|k|v)|mlp/up)/bias', P(None, 'tensor')),
  (r'head/kernel', P('fsdp', 'tensor')),
  (r'.*(scale|bias)', P()),
)


class Block(nnx.Module):
  """One layer: attention, then the MLP, each added to what came in, with a norm before or after."""

  def __init__(self, c: Any):
    self.attn_norm = LayerNorm(c.hidden, c.norm_eps, c.param_dtype)
    self.attn = Attention(
      c.hidden,
      c.heads,
      c.kv_heads,
      c.head_dim,
      qkv_bias=True,
      out_bias=True,
      causal=c.CAUSAL,
      implementation=c.attention,
      dtype=c.param_dtype,
    )
    self.mlp_norm = LayerNorm(c.hidden, c.norm_eps, c.param_dtype)
    self.mlp = MLP(c.hidden, c.intermediate, c.param_dtype, c.ACTIVATION)
    self.pre_norm = c.pre_norm

  def __call__(self, x, mask):
    if self.pre_norm:
      x = x + self.attn(self.attn_norm(x), mask=mask)
      return x + self.mlp(self.mlp_norm(x))
    x = self.attn_norm(x + self.attn(x, mask=mask))
    return self.mlp_norm(x + self.mlp(x))


class Input(nnx.Module):
  """Tokens and positions `i32[B, T]` to hidden states `[B, T, D]`."""

  def __init__(self, c: 'LearnedPositions'):
    self.embedding = declare(c.vocab, c.embed_dim, dtype=c.param_dtype)
    self.positions = Embed(c.positions + c.OFFSET, c.hidden, c.param_dtype)
    self.projected = c.embed_dim != c.hidden
    if self.projected:
      self.project_in = Linear(c.embed_dim, c.hidden, c.param_dtype)
    self.dtype, self.activations, self.offset = c.dtype, c.activations, c.OFFSET

  def __call__(self, tokens, positions):
    x = weights.take(self.embedding.get_value(), tokens).astype(self.dtype)
    x = spread_lookup(x, self.activations)
    x = self.project_in(x) if self.projected else x
    position = self.positions(positions + self.offset).astype(self.dtype)
    return x + jnp.broadcast_to(position, x.shape)


class Head(nnx.Module):
  """The last norm and the logits `[B, T, V]`; tied, it holds the embedding instead of a kernel."""

  def __init__(self, c: 'LearnedPositions'):
    self.normed, self.projected, self.tied = c.pre_norm, c.embed_dim != c.hidden, c.tied
    if self.normed:
      self.final_norm = LayerNorm(c.hidden, c.norm_eps, c.param_dtype)
    if self.projected:
      self.project_out = Linear(c.hidden, c.embed_dim, c.param_dtype)
    if self.tied:
      self.embed = Embed(c.vocab, c.embed_dim, c.param_dtype)
    else:
      self.head = Linear(c.embed_dim, c.vocab, c.param_dtype)

  def __call__(self, x):
    x = self.final_norm(x) if self.normed else x
    x = self.project_out(x) if self.projected else x
    return self.embed.attend(x) if self.tied else self.head(x)


class LayerNormBlocks(Stacked):
  """Families whose layers are `Block`s: OPT, GPT-2 and BERT."""

  @property
  def head_dim(self) -> int:
    """Head width `H`."""
    return self.hidden // self.heads

  @property
  def kv_heads(self) -> int:
    """Key-value heads: as many as there are queries."""
    return self.heads

  def block(self, layer: Params, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Applies one block.

    Args:
      layer: One layer of `params['blocks']`: the same dict without the leading axis.
      x: Hidden states `[B, T, D]`.
      mask: `bool[B, T]`, tokens that may be attended to; default all.

    Returns:
      Hidden states `[B, T, D]`.
    """
    return self._constrain(bind(Block(self), layer)(x, mask))


class LearnedPositions(LayerNormBlocks, Decoder):
  """What OPT and GPT-2 share; a family is a frozen dataclass with the fields these modules read."""

  OFFSET: ClassVar[int]  # Rows of the table of positions before that of the first token.
  ACTIVATION: ClassVar[str]  # Of the MLP.
  CAUSAL: ClassVar = True
  SHARDING: ClassVar = SHARDING

  def __post_init__(self):
    for name in ('heads', 'layers', 'positions', 'loss_chunk'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} is {getattr(self, name)}; it must be positive.')
    if self.hidden % self.heads:
      raise ValueError(
        f'hidden {self.hidden} is not a multiple of heads {self.heads}, which share it evenly.'
      )
    self._settle()

  def modules(self):
    return Input(self), Block(self), Head(self)

  def embed(
    self, params: Params, tokens: jax.Array, positions: jax.Array | None = None
  ) -> jax.Array:
    """Embeds tokens `i32[B, T]` as hidden states `[B, T, D]`; reads `params['embed']` only.

    Args:
      params: Parameters.
      tokens: `i32[B, T]`.
      positions: `i32[B, T]`, below `S`; default `0 .. T - 1`.

    Raises:
      ValueError: for a sequence longer than there are positions.
    """
    if tokens.shape[1] > self.positions:
      raise ValueError(
        f'a sequence of {tokens.shape[1]} tokens, but the model has {self.positions} positions; '
        'shorten config.seq_len, or train from scratch with more `positions`.'
      )
    if positions is None:
      positions = jnp.arange(tokens.shape[1])[None, :]
    return self._constrain(bind(Input(self), params['embed'])(tokens, positions))

  def hidden_states(
    self, params: Params, tokens: jax.Array, attention_mask: jax.Array | None = None
  ) -> jax.Array:
    """Returns hidden states `[B, T, D]` after the last block; arguments as in `logits`."""
    positions, mask = padding(attention_mask)
    return self.blocks(params['blocks'], self.embed(params, tokens, positions), mask)
