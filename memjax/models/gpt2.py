"""GPT-2: learned positions, layer norms, GELU, biases, a head tied to the embedding.

Shapes in this file: `B` sequences of `T` tokens, of at most `S`; hidden width `D`, MLP width `F`,
vocabulary `V`, `L` layers, `N` heads of width `H = D / N`. Parameters are a plain nested dict,
blocks stacked on a leading layer axis:

  embed/embedding [V, D]
  embed/positions/embedding [S, D]
  blocks/{attn_norm,mlp_norm}/{scale,bias} [L, D]
  blocks/attn/{q,k,v,o}/kernel [L, D, D]
  blocks/attn/{q,k,v,o}/bias [L, D]
  blocks/mlp/up/kernel [L, D, F]
  blocks/mlp/up/bias [L, F]
  blocks/mlp/down/kernel [L, F, D]
  blocks/mlp/down/bias [L, D]
  final_norm/{scale,bias} [D]
  head/kernel [D, V]                         absent when the head is tied to the embedding

Any leaf may be a `memjax.weights.Weight` instead of an array.
"""

import dataclasses
from typing import Any, ClassVar

from jax.sharding import Sharding

from memjax.models.learned_positions import LearnedPositions


@dataclasses.dataclass(frozen=True)
class GPT2(LearnedPositions):
  """A GPT-2 model: its sizes, and pure functions of its parameters.

  Hashable and without arrays, so it can be a static argument of `jit`. There is no dropout.

  Attributes:
    vocab: Vocabulary size `V`.
    hidden: Hidden width `D`.
    intermediate: MLP width `F`.
    heads: Attention heads `N`, a divisor of `hidden`.
    layers: Number of blocks `L`.
    positions: Longest sequence `S`.
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
    Radford et al., `Language Models are Unsupervised Multitask Learners
    <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>`_,
    2019
  """

  vocab: int
  hidden: int
  intermediate: int
  heads: int
  layers: int
  positions: int = 1024
  norm_eps: float = 1e-5
  tied: bool = True
  init_std: float = 0.02
  dtype: Any = 'float32'
  param_dtype: Any = 'float32'
  remat: str = 'full'
  attention: str = 'auto'
  loss_chunk: int = 1024
  activations: Sharding | None = None

  OFFSET: ClassVar = 0
  ACTIVATION: ClassVar = 'gelu_tanh'
  pre_norm: ClassVar = True

  @property
  def embed_dim(self) -> int:
    """Width of the embedding: that of the hidden states."""
    return self.hidden
