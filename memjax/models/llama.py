"""LLaMA and its relatives: RMS norms, rotary positions, grouped queries, a gated MLP.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, MLP width `F`, vocabulary `V`,
`L` layers, `N` query heads and `K` key-value heads of width `H`. Parameters are a plain nested
dict, blocks stacked on a leading layer axis:

  embed/embedding [V, D]
  blocks/attn_norm/scale [L, D]
  blocks/attn/q/kernel [L, D, N H]
  blocks/attn/{k,v}/kernel [L, D, K H]
  blocks/attn/o/kernel [L, N H, D]
  blocks/mlp_norm/scale [L, D]
  blocks/mlp/{gate,up}/kernel [L, D, F]
  blocks/mlp/down/kernel [L, F, D]
  final_norm/scale [D]
  head/kernel [D, V]            absent when the head is tied to the embedding

Any leaf may be a `memjax.weights.Weight` instead of an array.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from memjax.models.attention import IMPLEMENTATIONS, Attention
from memjax.models.cross_entropy import chunked_cross_entropy
from memjax.models.layers import Embed, GatedMLP, Linear, RMSNorm
from memjax.models.layout import spread_lookup, sum_over_batch
from memjax.models.module import bind, shapes
from memjax.models.remat import check_policy, rematerialise
from memjax.models.rotary import RopeScaling
from memjax.naming import fold_in_path, path_string

Params = dict[str, Any]

# Path -> layout over a mesh with axes 'data', 'fsdp', 'tensor'; the first match wins. Rows or
# columns of a pair of products are split over 'tensor' so that the pair needs one all-reduce; the
# other side over 'fsdp', gathered a layer at a time.
SHARDING = (
  (r'embed/embedding', P('tensor', 'fsdp')),
  (r'blocks/attn/(q|k|v)/kernel', P(None, 'fsdp', 'tensor')),
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
class Llama:
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
    # Frozen, but a field left open is settled here once, and types are made comparable and
    # hashable.
    settle = lambda name, value: object.__setattr__(self, name, value)
    settle('kv_heads', self.heads if self.kv_heads is None else self.kv_heads)
    settle('head_dim', self.hidden // self.heads if self.head_dim is None else self.head_dim)
    settle('dtype', jnp.dtype(self.dtype))
    settle('param_dtype', jnp.dtype(self.param_dtype))
    if self.kv_heads < 1 or self.heads % self.kv_heads:
      raise ValueError(
        f'heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: '
        'each key-value head serves equally many queries.'
      )
    if self.head_dim % 2:
      raise ValueError(
        f'head_dim {self.head_dim} is odd; rotary positions turn pairs of dimensions.'
      )
    if self.attention not in IMPLEMENTATIONS:
      raise ValueError(f'attention {self.attention!r} is none of {", ".join(IMPLEMENTATIONS)}.')
    check_policy(self.remat)

  # Parameters.

  def abstract(self) -> Params:
    """Returns the parameters' shapes: the nested dict with `jax.ShapeDtypeStruct` leaves."""
    stack = lambda s: jax.ShapeDtypeStruct((self.layers, *s.shape), s.dtype)
    embed = shapes(Embed(self.vocab, self.hidden, self.param_dtype))
    return {
      'embed': embed,
      'blocks': jax.tree.map(stack, shapes(Block(self))),
      **shapes(Head(self)),
    }

  def num_params(self) -> int:
    """Returns the number of parameters; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract()))

  def init(
    self, key: jax.Array, store: Callable[[jax.Array], Any] = lambda matrix: matrix
  ) -> Params:
    """Draws parameters: norms 1, matrices normal with standard deviation `init_std`.

    Each leaf's noise is addressed by its path and, in blocks, its layer, so the same key gives the
    same bits on any mesh and a deeper model begins with a shallower one's layers. Jit it with
    `out_shardings` to draw each shard where it stays.

    Args:
      key: PRNG key.
      store: Maps one matrix of a block to what is kept of it, such as `memjax.weights.quantise`; a
        stack is never held in any other form.
    """
    draw = lambda path, leaf: self._draw(key, path, leaf, store)
    return jax.tree.map_with_path(draw, self.abstract())

  def _draw(self, key, path, leaf, store):
    path = path_string(path)
    if path.endswith('scale'):
      return jnp.ones(leaf.shape, leaf.dtype)
    key = fold_in_path(key, path)
    # Drawn in f32: 16-bit normals are made from 16 random bits and have no tails.
    draw = lambda key, shape: (self.init_std * jax.random.normal(key, shape, jnp.float32)).astype(
      leaf.dtype
    )
    if not path.startswith('blocks/'):
      return draw(key, leaf.shape)
    # Layer after layer and not in one draw, whose 32-bit temporaries are several times the leaf.
    draw_layer = lambda layer: store(draw(jax.random.fold_in(key, layer), leaf.shape[1:]))
    return jax.lax.map(draw_layer, jnp.arange(self.layers))

  # The three pieces.

  def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
    """Embeds tokens `i32[B, T]` as hidden states `[B, T, D]`; reads `params['embed']` only."""
    embed = bind(Embed(self.vocab, self.hidden, self.param_dtype), params['embed'])
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
    return self._constrain(bind(Block(self), layer)(x, positions, mask))

  def head_loss(
    self, params: Params, x: jax.Array, targets: jax.Array, weights: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the summed cross-entropy and the count of tokens.

    Never holds logits of more than `loss_chunk` tokens a device; see `memjax.models.cross_entropy`.

    Args:
      params: Read for `final_norm` and `head` (`embed` when tied) only.
      x: Hidden states `[B, T, D]` after the last block.
      targets: Next tokens `i32[B, T]`.
      weights: `f32[B, T]`; 0 for tokens that do not count.

    Returns:
      `(sum f32[], count f32[])`; the loss is their quotient, taken once, after summing over
      everything.
    """

    def token_losses(head, x, targets, weights):
      chunk = max(1, self.loss_chunk // x.shape[0])
      return chunked_cross_entropy(bind(Head(self), head), x, targets, weights, chunk)

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
    x = self.embed(params, batch['tokens'])
    x = self.blocks(params['blocks'], x)
    return self.head_loss(params, x, batch['targets'], batch['weights'])

  def blocks(
    self,
    layers: Params,
    x: jax.Array,
    positions: jax.Array | None = None,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Applies all stacked blocks `[L, ...]` in one `lax.scan`, rematerialised as `remat` says."""
    block = rematerialise(self.block, self.remat)
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x, positions, mask), None), x, layers)
    return x

  def hidden_states(
    self, params: Params, tokens: jax.Array, attention_mask: jax.Array | None = None
  ) -> jax.Array:
    """Returns hidden states `[B, T, D]` after the last block; arguments as in `logits`."""
    positions = mask = None
    if attention_mask is not None:
      mask = attention_mask.astype(bool)
      # A sequence's first real token is at position 0, wherever its padding is.
      positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    return self.blocks(params['blocks'], self.embed(params, tokens), positions, mask)

  def head_logits(self, params: Params, x: jax.Array) -> jax.Array:
    """Returns logits `f32[B, T, V]` of hidden states `[B, T, D]`."""
    return bind(Head(self), self._head_params(params))(x).astype(jnp.float32)

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

  def _head_params(self, params: Params) -> Params:
    return {key: params[key] for key in ('final_norm', 'embed' if self.tied else 'head')}

  def _constrain(self, x: jax.Array) -> jax.Array:
    return x if self.activations is None else jax.lax.with_sharding_constraint(x, self.activations)
