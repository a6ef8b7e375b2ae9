"""Phi-1 to Phi-2: attention and MLP side by side on one norm, partly rotated heads, biases.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, MLP width `F`, vocabulary `V`,
`L` layers, `N` query heads and `K` key-value heads of width `H = D / N`, of which the first `R`
dimensions are rotated. Parameters are a plain nested dict, blocks stacked on a leading layer axis:

  embed/embedding [V, D]
  blocks/norm/{scale,bias} [L, D]
  blocks/attn/q/kernel [L, D, N H]           and bias [L, N H]
  blocks/attn/{k,v}/kernel [L, D, K H]       and bias [L, K H]
  blocks/attn/o/kernel [L, N H, D]           and bias [L, D]
  blocks/mlp/up/kernel [L, D, F]             and bias [L, F]
  blocks/mlp/down/kernel [L, F, D]           and bias [L, D]
  final_norm/{scale,bias} [D]
  head/kernel [D, V]                         and bias [V]

Any leaf may be a `memjax.weights.Weight` instead of an array.
"""

import dataclasses
from typing import Any, ClassVar

from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from memjax.models.attention import Attention
from memjax.models.layers import MLP, Embed, LayerNorm, Linear
from memjax.models.rotary_decoder import RotaryDecoder

# As `memjax.models.llama.SHARDING`; a bias lies as the columns of its matrix.
SHARDING = (
  (r'embed/embedding', P('tensor', 'fsdp')),
  (r'blocks/(attn/(q|k|v)|mlp/up)/kernel', P(None, 'fsdp', 'tensor')),
  (r'blocks/(attn/o|mlp/down)/kernel', P(None, 'tensor', 'fsdp')),
  (r'blocks/(attn/(q|k|v)|mlp/up)/bias', P(None, 'tensor')),
  (r'head/kernel', P('fsdp', 'tensor')),
  (r'head/bias', P('tensor')),
  (r'.*(scale|bias)', P()),
)


class Block(nnx.Module):
  """One layer: attention and MLP of the same normed input, both added to what came in."""

  def __init__(self, c: 'Phi'):
    self.norm = LayerNorm(c.hidden, c.norm_eps, c.param_dtype)
    self.attn = Attention(
      c.hidden,
      c.heads,
      c.kv_heads,
      c.head_dim,
      rope_theta=c.rope_theta,
      rotary_dim=c.rotary_dim,
      qkv_bias=True,
      out_bias=True,
      implementation=c.attention,
      dtype=c.param_dtype,
    )
    self.mlp = MLP(c.hidden, c.intermediate, c.param_dtype, 'gelu_tanh')

  def __call__(self, x, positions, mask):
    y = self.norm(x)
    return x + self.attn(y, positions, mask) + self.mlp(y)


class Head(nnx.Module):
  """The last norm and the logits `[B, T, V]`, with a bias."""

  def __init__(self, c: 'Phi'):
    self.final_norm = LayerNorm(c.hidden, c.norm_eps, c.param_dtype)
    self.head = Linear(c.hidden, c.vocab, c.param_dtype, bias=True)

  def __call__(self, x):
    return self.head(self.final_norm(x))


@dataclasses.dataclass(frozen=True)
class Phi(RotaryDecoder):
  """A model of the Phi-1, 1.5 or 2 kind: its sizes, and pure functions of its parameters.

  Hashable and without arrays, so it can be a static argument of `jit`. There is no dropout.

  Attributes:
    vocab: Vocabulary size `V`.
    hidden: Hidden width `D`.
    intermediate: MLP width `F`.
    heads: Query heads `N`, a divisor of `hidden`.
    layers: Number of blocks `L`.
    rotary_dim: Leading dimensions `R` of a head that are rotated, even.
    kv_heads: Key-value heads `K`, a divisor of `heads`; default `heads`.
    norm_eps: Added to the variance in every norm.
    rope_theta: Base of the rotary wavelengths.
    positions: Longest sequence the released model was trained on; nothing here is limited by it.
    init_std: Standard deviation of initial matrices; norms start at 1, biases at 0.
    dtype: Of activations and products. Norms, rotations, attention scores and losses are f32
      whatever it is.
    param_dtype: Of the parameters.
    remat: What a block keeps for the backward pass; see `memjax.models.remat.POLICIES`.
    attention: 'auto', 'xla' or 'cudnn'; see `memjax.models.attention.choose`.
    loss_chunk: Tokens on each device whose logits exist at once; their cost is `4 V loss_chunk`
      bytes.
    activations: Layout of hidden states `[B, T, D]`; see `memjax.models.llama.Llama`.

  Raises:
    ValueError: when sizes do not fit together, saying which.

  References:
    Li et al., `Textbooks Are All You Need II: phi-1.5 technical report
    <https://arxiv.org/abs/2309.05463>`_, 2023
  """

  vocab: int
  hidden: int
  intermediate: int
  heads: int
  layers: int
  rotary_dim: int
  kv_heads: int | None = None
  norm_eps: float = 1e-5
  rope_theta: float = 10_000.0
  positions: int = 2048
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  remat: str = 'full'
  attention: str = 'auto'
  loss_chunk: int = 1024
  activations: Sharding | None = None

  SHARDING: ClassVar = SHARDING
  tied: ClassVar = False

  def __post_init__(self):
    for name in ('heads', 'layers', 'loss_chunk'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} is {getattr(self, name)}; it must be positive.')
    self._settle(kv_heads=self.heads if self.kv_heads is None else self.kv_heads)
    if self.hidden % self.heads:
      raise ValueError(
        f'hidden {self.hidden} is not a multiple of heads {self.heads}, which share it evenly.'
      )
    if self.kv_heads < 1 or self.heads % self.kv_heads:
      raise ValueError(
        f'heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: '
        'each key-value head serves equally many queries.'
      )
    if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
      raise ValueError(
        f'rotary_dim {self.rotary_dim} is no even number between 2 and the head width '
        f'{self.head_dim}.'
      )

  @property
  def head_dim(self) -> int:
    """Head width `H`."""
    return self.hidden // self.heads

  def modules(self):
    return Embed(self.vocab, self.hidden, self.param_dtype), Block(self), Head(self)
