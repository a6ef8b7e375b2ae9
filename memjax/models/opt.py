"""OPT: learned positions, layer norms, ReLU, biases, a head tied to the embedding.

Shapes in this file: `B` sequences of `T` tokens, of at most `S`; hidden width `D`, width `E` of the
embedding, MLP width `F`, vocabulary `V`, `L` layers, `N` heads of width `H = D / N`. Parameters are
a plain nested dict, blocks stacked on a leading layer axis:

  embed/embedding [V, E]
  embed/positions/embedding [S + 2, D]
  embed/project_in/kernel [E, D]             present when E differs from D
  blocks/{attn_norm,mlp_norm}/{scale,bias} [L, D]
  blocks/attn/{q,k,v,o}/kernel [L, D, D]
  blocks/attn/{q,k,v,o}/bias [L, D]
  blocks/mlp/up/kernel [L, D, F]
  blocks/mlp/up/bias [L, F]
  blocks/mlp/down/kernel [L, F, D]
  blocks/mlp/down/bias [L, D]
  final_norm/{scale,bias} [D]                absent when norms come after what they norm
  project_out/kernel [D, E]                  present when E differs from D
  head/kernel [E, V]                         absent when the head is tied to the embedding

Any leaf may be a `memjax.weights.Weight` instead of an array.
"""

import dataclasses
from typing import Any, ClassVar

from jax.sharding import Sharding

from memjax.models.learned_positions import LearnedPositions


@dataclasses.dataclass(frozen=True)
class OPT(LearnedPositions):
  """An OPT model: its sizes, and pure functions of its parameters.

  Hashable and without arrays, so it can be a static argument of `jit`. The three pieces `embed`,
  `block` and `head_loss` compose to `loss`; a step that updates layer by layer, or streams them
  from host memory, composes them itself. There is no dropout.

  Attributes:
    vocab: Vocabulary size `V`.
    hidden: Hidden width `D`.
    intermediate: MLP width `F`.
    heads: Attention heads `N`, a divisor of `hidden`.
    layers: Number of blocks `L`.
    positions: Longest sequence `S`.
    embed_dim: Width `E` of the embedding and of what the head multiplies; default `hidden`. Only
      the 350M model's differs.
    pre_norm: Whether norms come before attention and MLP, and once after the last block; the 350M
      model has them after each sum instead.
    norm_eps: Added to the variance in every norm.
    tied: Whether the head multiplies by the embedding.
    init_std: Standard deviation of initial matrices; norms start at 1, biases at 0.
    dtype: Of activations and products. Norms, attention scores and losses are f32 whatever it is.
    param_dtype: Of the parameters.
    remat: What a block keeps for the backward pass; see `memjax.models.remat.POLICIES`.
    attention: 'auto', 'xla' or 'cudnn'; see `memjax.models.attention.choose`.
    loss_chunk: Tokens on each device whose logits exist at once; their cost is `4 V loss_chunk`
      bytes.
    activations: Layout of hidden states `[B, T, D]`; see `memjax.models.llama.Llama`.

  Raises:
    ValueError: when sizes do not fit together, saying which.

  References:
    Zhang et al., `OPT: Open Pre-trained Transformer Language Models
    <https://arxiv.org/abs/2205.01068>`_, 2022
  """

  vocab: int
  hidden: int
  intermediate: int
  heads: int
  layers: int
  positions: int = 2048
  embed_dim: int | None = None
  pre_norm: bool = True
  norm_eps: float = 1e-5
  tied: bool = True
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  remat: str = 'full'
  attention: str = 'auto'
  loss_chunk: int = 1024
  activations: Sharding | None = None

  OFFSET: ClassVar = 2  # In all released models.
  ACTIVATION: ClassVar = 'relu'

  def __post_init__(self):
    super().__post_init__()
    # Frozen, but a field left open is settled here once.
    width = self.hidden if self.embed_dim is None else self.embed_dim
    object.__setattr__(self, 'embed_dim', width)
