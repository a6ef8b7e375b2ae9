"""LLaMA and its relatives (Mistral, Qwen, Phi-3): RMS norms, rotary positions, grouped queries, a
gated MLP.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, MLP width `F`, vocabulary `V`,
`L` layers, `N` query heads and `K` key-value heads of width `H`. Parameters are a plain nested
dict, blocks stacked on a leading layer axis:

  embed/embedding [V, D]
  blocks/attn_norm/scale [L, D]
  blocks/attn/q/kernel [L, D, N H]
  blocks/attn/{k,v}/kernel [L, D, K H]
  blocks/attn/q/bias [L, N H]              with `qkv_bias`
  blocks/attn/{k,v}/bias [L, K H]          with `qkv_bias`
  blocks/attn/{q,k}_norm/scale [L, H]      with `qk_norm`
  blocks/attn/o/kernel [L, N H, D]
  blocks/mlp_norm/scale [L, D]
  blocks/mlp/{gate,up}/kernel [L, D, F]
  blocks/mlp/down/kernel [L, F, D]
  final_norm/scale [D]
  head/kernel [D, V]                       absent when the head is tied to the embedding

Any leaf may be a `memjax.weights.Weight` instead of an array.
"""

import dataclasses
from typing import Any, ClassVar

from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from memjax.models.attention import Attention
from memjax.models.layers import Embed, GatedMLP, Linear, RMSNorm
from memjax.models.rotary import RopeScaling
from memjax.models.rotary_decoder import RotaryDecoder

# Path -> layout over a mesh with axes 'data', 'fsdp', 'tensor'; the first match wins. Rows or
# columns of a pair of products are split over 'tensor' so that the pair needs one all-reduce; the
# other side over 'fsdp', gathered a layer at a time.
SHARDING = (
  (r'embed/embedding', P('tensor', 'fsdp')),
  (r'blocks/attn/(q|k|v)/kernel', P(None, 'fsdp', 'tensor')),
  (r'blocks/attn/(q|k|v)/bias', P(None, 'tensor')),
  (r'blocks/attn/o/kernel', P(None, 'tensor', 'fsdp')),
  (r'blocks/mlp/(gate|up)/kernel', P(None, 'fsdp', 'tensor')),
  (r'blocks/mlp/down/kernel', P(None, 'tensor', 'fsdp')),
  (r'head/kernel', P('fsdp', 'tensor')),
  (r'.*norm/scale', P()),
)


class Block(nnx.Module):
  """One layer: attention, then the MLP, each added to what came in."""

  def __init__(self, c: 'Llama'):
    self.attn_norm = RMSNorm(c.hidden, c.norm_eps, c.param_dtype)
    self.attn = Attention(
      c.hidden,
      c.heads,
      c.kv_heads,
      c.head_dim,
      rope_theta=c.rope_theta,
      rope_scaling=c.rope_scaling,
      qkv_bias=c.qkv_bias,
      qk_norm_eps=c.norm_eps if c.qk_norm else None,
      window=c.window,
      implementation=c.attention,
      dtype=c.param_dtype,
    )
    self.mlp_norm = RMSNorm(c.hidden, c.norm_eps, c.param_dtype)
    self.mlp = GatedMLP(c.hidden, c.intermediate, c.param_dtype)

  def __call__(self, x, positions, mask):
    x = x + self.attn(self.attn_norm(x), positions, mask)
    return x + self.mlp(self.mlp_norm(x))


class Head(nnx.Module):
  """The last norm and the logits `[B, T, V]`; tied, it holds the embedding instead of a kernel."""

  def __init__(self, c: 'Llama'):
    self.final_norm = RMSNorm(c.hidden, c.norm_eps, c.param_dtype)
    if c.tied:
      self.embed = Embed(c.vocab, c.hidden, c.param_dtype)
    else:
      self.head = Linear(c.hidden, c.vocab, c.param_dtype)
    self.tied = c.tied

  def __call__(self, x):
    x = self.final_norm(x)
    return self.embed.attend(x) if self.tied else self.head(x)


@dataclasses.dataclass(frozen=True)
class Llama(RotaryDecoder):
  """A LLaMA-family model: its sizes, and pure functions of its parameters.

  Hashable and without arrays, so it can be a static argument of `jit`. The three pieces `embed`,
  `block` and `head_loss` compose to `loss`; a step that updates layer by layer, or streams them
  from host memory, composes them itself.

  Attributes:
    vocab: Vocabulary size `V`.
    hidden: Hidden width `D`.
    intermediate: MLP width `F`.
    heads: Query heads `N`.
    layers: Number of blocks `L`.
    kv_heads: Key-value heads `K`, a divisor of `heads`; default `heads`.
    head_dim: Head width `H`, even; default `hidden / heads`.
    norm_eps: Added to the mean square in every norm.
    rope_theta: Base of the rotary wavelengths.
    rope_scaling: Llama 3.1's stretching of slow rotations.
    qkv_bias: Whether queries, keys and values have biases, as in Qwen2.
    qk_norm: Whether each head's queries and keys are normed before their rotation, as in Qwen3.
    window: Tokens that one reads at most, itself and those before it, as in Mistral; None for all.
    tied: Whether the head multiplies by the embedding.
    init_std: Standard deviation of initial matrices; norms start at 1.
    dtype: Of activations and products. Norms, rotations, attention scores and losses are f32
      whatever it is.
    param_dtype: Of the parameters.
    remat: What a block keeps for the backward pass; see `memjax.models.remat.POLICIES`.
    attention: 'auto', 'xla' or 'cudnn'; see `memjax.models.attention.choose`.
    loss_chunk: Tokens on each device whose logits exist at once; their cost is `4 V loss_chunk`
      bytes.
    activations: Layout of hidden states `[B, T, D]`, imposed after the embedding and after each
      block; None leaves it to the compiler. Under a mesh, give `NamedSharding(mesh, P(('data',
      'fsdp')))`: otherwise the compiler may follow the parameters' sharding instead of the batch's.

  Raises:
    ValueError: when sizes do not fit together, saying which.
  """

  vocab: int
  hidden: int
  intermediate: int
  heads: int
  layers: int
  kv_heads: int | None = None
  head_dim: int | None = None
  norm_eps: float = 1e-6
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  qkv_bias: bool = False
  qk_norm: bool = False
  window: int | None = None
  tied: bool = False
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  remat: str = 'full'
  attention: str = 'auto'
  loss_chunk: int = 1024
  activations: Sharding | None = None

  SHARDING: ClassVar = SHARDING

  def __post_init__(self):
    if self.heads < 1 or self.layers < 1 or self.loss_chunk < 1:
      raise ValueError(
        f'heads {self.heads}, layers {self.layers} and loss_chunk {self.loss_chunk} '
        'must be positive.'
      )
    if self.head_dim is None and self.hidden % self.heads:
      raise ValueError(
        f'hidden {self.hidden} is not a multiple of heads {self.heads}; '
        'set head_dim to say how wide a head is.'
      )
    self._settle(
      kv_heads=self.heads if self.kv_heads is None else self.kv_heads,
      head_dim=self.hidden // self.heads if self.head_dim is None else self.head_dim,
    )
    if self.kv_heads < 1 or self.heads % self.kv_heads:
      raise ValueError(
        f'heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: '
        'each key-value head serves equally many queries.'
      )
    if self.head_dim % 2:
      raise ValueError(
        f'head_dim {self.head_dim} is odd; rotary positions turn pairs of dimensions.'
      )
    if self.window is not None and self.window < 1:
      raise ValueError(f'window {self.window}: a token reads at least itself; None sets no limit.')

  def modules(self):
    return Embed(self.vocab, self.hidden, self.param_dtype), Block(self), Head(self)
