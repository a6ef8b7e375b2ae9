"""BERT, RoBERTa and their kin: encoders of whole sentences, with a head for a task.

Shapes in this file: `B` sequences of `T` tokens, of at most `S`; hidden width `D`, MLP width `F`,
vocabulary `V`, `L` layers, `N` heads of width `H = D / N`, `n` labels. Parameters are a plain
nested dict, blocks stacked on a leading layer axis:

  embed/embedding [V, D]
  embed/positions/embedding [S + offset, D]
  embed/types/embedding [types, D]
  embed/norm/{scale,bias} [D]
  blocks/attn/{q,k,v,o}/kernel [L, D, D]     and bias [L, D]
  blocks/{attn_norm,mlp_norm}/{scale,bias} [L, D]
  blocks/mlp/up/kernel [L, D, F]             and bias [L, F]
  blocks/mlp/down/kernel [L, F, D]           and bias [L, D]
  head/dense/kernel [D, D]                   and bias [D]; of a head that reads the first token
  head/out/kernel [D, n]                     and bias [n]; absent for embeddings

Any leaf may be a `memjax.weights.Weight` instead of an array.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from memjax import weights
from memjax.models import encoder_heads
from memjax.models.decoder import padding
from memjax.models.layers import Embed, LayerNorm
from memjax.models.layout import spread_lookup
from memjax.models.learned_positions import Block, LayerNormBlocks
from memjax.models.module import bind, declare
from memjax.models.stacked import Params

# As `memjax.models.llama.SHARDING`; a bias lies as the columns of its matrix.
SHARDING = (
  (r'(positions|types)/embedding', P(None, 'fsdp')),
  (r'embed/embedding', P('tensor', 'fsdp')),
  (r'blocks/(attn/(q|k|v)|mlp/up)/kernel', P(None, 'fsdp', 'tensor')),
  (r'blocks/(attn/o|mlp/down)/kernel', P(None, 'tensor', 'fsdp')),
  (r'blocks/(attn/(q|k|v)|mlp/up)/bias', P(None, 'tensor')),
  (r'head/(dense|out)/kernel', P('fsdp')),
  (r'.*(scale|bias)', P()),
)


class Input(nnx.Module):
  """Tokens, positions and token types `i32[B, T]` to hidden states `[B, T, D]`."""

  def __init__(self, c: 'Bert'):
    self.embedding = declare(c.vocab, c.hidden, dtype=c.param_dtype)
    self.positions = Embed(c.positions + c.offset, c.hidden, c.param_dtype)
    self.types = Embed(c.types, c.hidden, c.param_dtype)
    self.norm = LayerNorm(c.hidden, c.norm_eps, c.param_dtype)
    self.dtype, self.activations, self.offset = c.dtype, c.activations, c.offset

  def __call__(self, tokens, positions, types):
    x = weights.take(self.embedding.get_value(), tokens).astype(self.dtype)
    x = spread_lookup(x, self.activations)
    place = self.positions(positions + self.offset) + self.types(types)
    return self.norm(x + jnp.broadcast_to(place.astype(self.dtype), x.shape))


@dataclasses.dataclass(frozen=True)
class Bert(LayerNormBlocks):
  """An encoder of the BERT family with a head: its sizes, and pure functions of its parameters.

  Hashable and without arrays, so it can be a static argument of `jit`. Tokens attend to both sides,
  norms come after sums, GELU is the exact one. There is no dropout.

  Attributes:
    vocab: Vocabulary size `V`.
    hidden: Hidden width `D`.
    intermediate: MLP width `F`.
    heads: Attention heads `N`, a divisor of `hidden`.
    layers: Number of blocks `L`.
    positions: Longest sequence `S`.
    offset: Rows of the table of positions before that of the first token: 0 for BERT, 2 for
      RoBERTa.
    types: Token types: 2 for BERT, first and second sentence; 1 for RoBERTa.
    pad_id: Token that fills sequences up to a common length; the mask hides it.
    task: What the head is for, a key of `memjax.models.encoder_heads.TASKS`.
    labels: Classes `n`.
    pool: What a head for whole sequences reads: 'first', the first token through a dense layer with
      tanh (BERT's pooler; RoBERTa's head), or 'mean', the mean over tokens as it is.
    norm_eps: Added to the variance in every norm.
    init_std: Standard deviation of initial matrices; norms start at 1, biases at 0.
    dtype: Of activations and products. Norms, attention scores and losses are f32 whatever it is.
    param_dtype: Of the parameters.
    remat: What a block keeps for the backward pass; see `memjax.models.remat.POLICIES`.
    attention: 'auto', 'xla' or 'cudnn'; see `memjax.models.attention.choose`.
    activations: Layout of hidden states `[B, T, D]`; see `memjax.models.llama.Llama`.

  Raises:
    ValueError: when sizes do not fit together, saying which.

  References:
    Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2018; Liu et al., `RoBERTa
    <https://arxiv.org/abs/1907.11692>`_, 2019; Reimers and Gurevych, `Sentence-BERT
    <https://arxiv.org/abs/1908.10084>`_, 2019 (the mean over tokens)
  """

  vocab: int
  hidden: int
  intermediate: int
  heads: int
  layers: int
  positions: int = 512
  offset: int = 0
  types: int = 2
  pad_id: int = 0
  task: str = 'classification'
  labels: int = 2
  pool: str = 'first'
  norm_eps: float = 1e-12
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  remat: str = 'full'
  attention: str = 'auto'
  activations: Sharding | None = None

  SHARDING: ClassVar = SHARDING
  CAUSAL: ClassVar = False
  ACTIVATION: ClassVar = 'gelu'
  pre_norm: ClassVar = False
  tied: ClassVar = False

  def __post_init__(self):
    for name in ('heads', 'layers', 'positions', 'types', 'labels'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} is {getattr(self, name)}; it must be positive.')
    if self.hidden % self.heads:
      raise ValueError(
        f'hidden {self.hidden} is not a multiple of heads {self.heads}, which share it evenly.'
      )
    encoder_heads.check(self.task, self.pool)
    self._settle()

  def modules(self):
    return Input(self), Block(self), encoder_heads.Head(self)

  def embed(
    self,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Embeds tokens `i32[B, T]` as hidden states `[B, T, D]`; reads `params['embed']` only.

    Args:
      params: Parameters.
      tokens: `i32[B, T]`.
      positions: `i32[B, T]`, below `S`; default `0 .. T - 1`.
      token_types: `i32[B, T]`, below `types`; default 0, and not read where there is one type.

    Raises:
      ValueError: for a sequence longer than there are positions.
    """
    if tokens.shape[1] > self.positions:
      raise ValueError(
        f'a sequence of {tokens.shape[1]} tokens, but the model has {self.positions} positions; '
        'truncate it, or train from scratch with more `positions`.'
      )
    if positions is None:
      positions = jnp.arange(tokens.shape[1])[None, :]
    if token_types is None or self.types == 1:
      token_types = jnp.zeros_like(positions)
    shape = jnp.broadcast_shapes(positions.shape, token_types.shape)
    positions, token_types = (jnp.broadcast_to(x, shape) for x in (positions, token_types))
    return self._constrain(bind(Input(self), params['embed'])(tokens, positions, token_types))

  def hidden_states(
    self,
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array | None = None,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns hidden states `[B, T, D]` after the last block; arguments as in `logits`."""
    positions, mask = padding(attention_mask)
    x = self.embed(params, tokens, positions, token_types)
    return self.blocks(params['blocks'], x, mask)

  def logits(
    self,
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array | None = None,
    token_types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns what the head says of each sequence.

    Args:
      params: Parameters.
      tokens: `i32[B, T]`.
      attention_mask: `[B, T]`, nonzero for tokens and zero for padding on either side, which
        changes nothing; default all tokens.
      token_types: `i32[B, T]`, below `types`; default 0.

    Returns:
      `f32[B, n]` for 'classification', `f32[B]` for 'regression', `f32[B, T, 2]` for 'span' (of the
      span's first and last token; padding has the least f32), `f32[B, D]` of norm 1 for
      'embedding'.
    """
    x = self.hidden_states(params, tokens, attention_mask, token_types)
    mask = jnp.ones(tokens.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    return bind(encoder_heads.Head(self), self._head_params(params))(x, mask)

  def loss(self, params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the summed loss and the count of rows, whose quotient is the loss.

    Cross-entropy in nats for 'classification', of first and last token on average for 'span';
    squared difference for 'regression'.

    Args:
      params: Parameters.
      batch: As `batch_shapes` says; `token_types` may be left out.

    Raises:
      ValueError: for 'embedding', which has no labels.
    """
    logits = self.logits(params, batch['tokens'], batch['attention_mask'], batch.get('token_types'))
    row_weights = batch['weights'].astype(jnp.float32)
    losses = encoder_heads.losses(self.task, logits, batch['labels'])
    return jnp.sum(row_weights * losses), jnp.sum(row_weights)

  def batch_shapes(self, batch: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch as shapes.

    `tokens`, `attention_mask` and `token_types` are `i32[B, T]`; `labels` are `i32[B]`, `f32[B]`
    for 'regression' or `i32[B, 2]` for 'span'; `weights` `f32[B]` are 0 for rows that fill the
    batch up.
    """
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return {
      'tokens': tokens,
      'attention_mask': tokens,
      'token_types': tokens,
      'labels': encoder_heads.labels(self.task, batch),
      'weights': jax.ShapeDtypeStruct((batch,), jnp.float32),
    }
