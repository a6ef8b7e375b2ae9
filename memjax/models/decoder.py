"""What language models of any family share: how parameters are drawn, and how pieces compose.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, vocabulary `V`, `L` layers.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.models.cross_entropy import chunked_cross_entropy
from memjax.models.layout import sum_over_batch
from memjax.models.module import bind, shapes
from memjax.models.remat import rematerialise
from memjax.naming import fold_in_path, path_string

Params = dict[str, Any]


class Decoder:
  """Pure functions of the parameters of a model, over four methods that a family provides.

  A family is a frozen dataclass with the fields `layers`, `init_std`, `remat`, `loss_chunk` and
  `activations` (see `memjax.models.llama.Llama`), the pieces `embed` and `block`, and `modules`.
  """

  def modules(self) -> tuple[nnx.Module, nnx.Module, nnx.Module]:
    """Returns declarations: of what `embed` reads, of one block, and of the head, whose keys are
    top-level keys of the parameters.
    """
    raise NotImplementedError

  # Parameters.

  def abstract(self) -> Params:
    """Returns the parameters' shapes: the nested dict with `jax.ShapeDtypeStruct` leaves."""
    stack = lambda s: jax.ShapeDtypeStruct((self.layers, *s.shape), s.dtype)
    embed, block, head = map(shapes, self.modules())
    return {**head, 'embed': embed, 'blocks': jax.tree.map(stack, block)}

  def num_params(self) -> int:
    """Returns the number of parameters; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract()))

  def init(
    self, key: jax.Array, store: Callable[[jax.Array], Any] = lambda matrix: matrix
  ) -> Params:
    """Draws parameters: norms 1, biases 0, matrices normal with standard deviation `init_std`.

    Each leaf's noise is addressed by its path and, in blocks, its layer, so the same key gives the
    same bits on any mesh and a deeper model begins with a shallower one's layers. Jit it with
    `out_shardings` to draw each shard where it stays.

    Args:
      key: PRNG key.
      store: Maps one matrix of a block to what is kept of it, such as `memjax.weights.quantise`; a
        stack is never held in any other form.
    """
    draw = lambda path, leaf: self._draw(key, path_string(path), leaf, store)
    return jax.tree.map_with_path(draw, self.abstract())

  def _draw(self, key, path, leaf, store):
    if path.endswith(('scale', 'bias')):
      return jnp.full(leaf.shape, path.endswith('scale'), leaf.dtype)
    key = fold_in_path(key, path)

    def draw(key, shape):
      # Drawn in f32: 16-bit normals are made from 16 random bits and have no tails.
      return (self.init_std * jax.random.normal(key, shape, jnp.float32)).astype(leaf.dtype)

    if not path.startswith('blocks/'):
      return draw(key, leaf.shape)
    # Layer after layer and not in one draw, whose 32-bit temporaries are several times the leaf.
    draw_layer = lambda layer: store(draw(jax.random.fold_in(key, layer), leaf.shape[1:]))
    return jax.lax.map(draw_layer, jnp.arange(self.layers))

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

  def blocks(self, layers: Params, x: jax.Array, *args: Any) -> jax.Array:
    """Applies all stacked blocks `[L, ...]` in one `lax.scan`, rematerialised as `remat` says;
    `args` are those of `block` after the hidden states.
    """
    block = rematerialise(self.block, self.remat)
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x, *args), None), x, layers)
    return x

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

  def _head(self, params: Params) -> nnx.Module:
    return bind(self.modules()[2], params)

  def _head_params(self, params: Params) -> Params:
    """What the head reads: of the embedding, when tied, the part it declares."""
    declared = shapes(self.modules()[2])
    pick = lambda key, part: {k: params[key][k] for k in part} if key == 'embed' else params[key]
    return {key: pick(key, part) for key, part in declared.items()}

  def _constrain(self, x: jax.Array) -> jax.Array:
    return x if self.activations is None else jax.lax.with_sharding_constraint(x, self.activations)


def padding(attention_mask: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
  """Returns positions `i32[B, T]` and which tokens may be attended to, `bool[B, T]`; None for None.

  A sequence's first real token is at position 0, wherever its padding is.
  """
  if attention_mask is None:
    return None, None
  mask = attention_mask.astype(bool)
  return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0), mask
