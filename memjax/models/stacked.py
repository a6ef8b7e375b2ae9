"""What models of any family share: how parameters are drawn, and a scan over the blocks.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, `L` layers.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memjax.models import attention
from memjax.models.module import bind, shapes
from memjax.models.remat import check_policy, rematerialise
from memjax.naming import fold_in_path, nearest, path_string

Params = dict[str, Any]


def check_fields(family: type, fields: Iterable[str]) -> None:
  """Raises a `ValueError` for the name of a field that a family lacks, with the nearest."""
  known = [field.name for field in dataclasses.fields(family)]
  for field in fields:
    if field not in known:
      raise ValueError(f'{family.__name__} has no field {field!r}; {nearest(field, known)}')


class Stacked:
  """Pure functions of the parameters of a model whose blocks are alike and stacked `[L, ...]`.

  A family is a frozen dataclass with the fields `layers`, `init_std`, `dtype`, `param_dtype`,
  `remat`, `attention` and `activations` (see `memjax.models.llama.Llama`), a method `block`, and
  `modules`.
  """

  def modules(self) -> tuple[nnx.Module, nnx.Module, nnx.Module]:
    """Returns declarations: of what `embed` reads, of one block, and of the head, whose keys are
    top-level keys of the parameters.
    """
    raise NotImplementedError

  def _settle(self, **fields: Any) -> None:
    """Checks the words among a family's fields, makes its types comparable and hashable, and sets
    `fields`, which were left open: once, in `__post_init__`, since a family is frozen.
    """
    attention.check(self.attention)
    check_policy(self.remat)
    types = {name: jnp.dtype(getattr(self, name)) for name in ('dtype', 'param_dtype')}
    for name, value in {**types, **fields}.items():
      object.__setattr__(self, name, value)

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

  # Blocks and head.

  def blocks(self, layers: Params, x: jax.Array, *args: Any) -> jax.Array:
    """Applies all stacked blocks `[L, ...]` in one `lax.scan`, rematerialised as `remat` says;
    `args` are those of `block` after the hidden states.
    """
    block = rematerialise(self.block, self.remat)
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x, *args), None), x, layers)
    return x

  def _head(self, params: Params) -> nnx.Module:
    return bind(self.modules()[2], params)

  def _head_params(self, params: Params) -> Params:
    """What the head reads: of the embedding, when tied, the part it declares."""
    declared = shapes(self.modules()[2])
    pick = lambda key, part: {k: params[key][k] for k in part} if key == 'embed' else params[key]
    return {key: pick(key, part) for key, part in declared.items()}

  def _constrain(self, x: jax.Array) -> jax.Array:
    return x if self.activations is None else jax.lax.with_sharding_constraint(x, self.activations)
