"""Optimizer state in 8 or 4 bits.

Shapes in this file: a parameter is `[..., m, n]`; blocks of `b` numbers share a scale, see
`memjax.transforms.blockwise`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax.naming import path_string
from memjax.transforms import blockwise, codes, explicit, slices
from memjax.transforms import stored as stored_lib
from memjax.transforms.float32 import Float32, in_float32
from memjax.transforms.units import unit_axes

# Names under which transforms keep what has the shape of a parameter, and whether it has a sign.
SIGNS = {
  'mu': 'signed',
  'trace': 'signed',
  'ema': 'signed',
  'nu': 'unsigned',
  'nu_max': 'unsigned',
  'sum_of_squares': 'unsigned',
}


class QuantizeState(NamedTuple):
  """State of `quantize_state`: two trees of the inner state's structure."""

  inner: optax.OptState  # Codes u8 or f8, [..., m, n] or [..., m, n / 2]; f32 where not quantised.
  scales: optax.OptState  # f32[..., m, n / b]; MaskedNode where not quantised.


def quantize_state(
  inner: optax.GradientTransformation,
  bits: Literal[8, 4] = 8,
  kind: Literal['dynamic', 'linear', 'fp8'] = 'dynamic',
  block_size: int = 256,
  *,
  min_size: int = 4096,
  signs: Mapping[str, str] | None = None,
  layout: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the moments of `inner` in 8 or 4 bits a number.

  A moment is stored as codes, to the nearest, of its quotient by its block's largest magnitude.
  Every update decodes it, runs `inner` in f32, returns the update that f32 moments give, and only
  then rounds them: after the first update the parameters are those of the unquantised `inner`.

  A moment takes `bits / 8 + 4 / b` bytes a number, `b` the block: Adam 2.03 bytes a parameter at 8
  bits and blocks of 256, 1.06 at 4 bits and blocks of 128, against 8. Codes and scales have their
  parameter's axes in place, are sharded as it is, and communicate nothing.

  If `inner` treats every number alone, which is read off its operations (Adam, Lion, momentum do;
  a clip by the global norm does not), large leaves are updated slice by slice: a layer at a time,
  and with `layout` half a million numbers at a time. No f32 copy of a whole moment exists then.

  Example:
    >>> import jax.numpy as jnp
    >>> optimizer = quantize_state(optax.scale_by_adam())
    >>> state = optimizer.init({'w': jnp.zeros([8, 64, 512]), 'bias': jnp.zeros([64])})
    >>> state.inner.mu['w'].dtype, state.scales.mu['w'].shape, state.inner.mu['bias'].dtype
    (dtype('uint8'), (8, 64, 2), dtype('float32'))

  Args:
    inner: Any transform. Quantised is what it keeps under a known name in a parameter's shape. Wrap
      the transform that has the moments: `chain(clip, quantize_state(adam))`, and
      `project(quantize_state(adam), rank)` for moments in a subspace.
    bits: Of a code; two 4-bit codes share a byte.
    kind: Map from codes to numbers, see `memjax.transforms.codes.make`.
    block_size: Largest number of neighbours that share a scale. The block is the largest divisor of
      the last axis (the one before, if the last has no good one) that is not above it.
    min_size: Matrices, and vectors of a stack, with fewer numbers stay f32.
    signs: For names of the inner state beyond mu, trace, ema, nu, nu_max and sum_of_squares:
      `'signed'`, `'unsigned'`, or `'keep'` for f32. A second moment is unsigned.
    layout: `memjax.sharding.layout(...)`: says where devices divide a leaf, and blocks then divide
      their shards. Under Explicit axes a leaf's type says so; under Auto axes nothing else does,
      and blocks that straddle devices are communicated. State of a mesh with smaller blocks has
      other shapes; a `block_size` that divides every shard gives the same state on every mesh.

  Returns:
    A transform with state `QuantizeState`.

  Raises:
    ValueError: here for an argument out of range; at `init` for state in the shape of a large
      parameter under a name that is not known, and if there is nothing to quantise.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2022

    Li et al., `Memory Efficient Optimizers with 4-bit States
    <https://arxiv.org/abs/2309.01507>`_, 2023
  """
  coders = {sign: codes.make(kind, bits, sign == 'signed') for sign in ('signed', 'unsigned')}
  signs = SIGNS | dict(signs or {})
  _check(block_size, signs)
  inner = in_float32(inner)

  def cut(path, shape, blocks):
    ways = (1,) * len(shape) if layout is None else layout.ways(path, shape)
    return _count(shape, blocks, ways, layout is not None)

  def init(params):
    leaves, tree = jax.tree.flatten(inner.init(params))
    belongs = stored_lib.find(tree.unflatten(leaves), params)
    _check_names(belongs, leaves, params, signs, min_size)
    inner_leaves, scales = list(leaves), [optax.MaskedNode()] * len(leaves)
    for i, (_, path, name) in belongs.items():
      leaf = leaves[i]
      if _unit_size(path, leaf) >= min_size and signs.get(name) in coders:
        ways = explicit.ways(leaf) if layout is None else layout.ways(path, leaf.shape)
        blocks = blockwise.plan(leaf.shape, block_size, bits, ways)
        if blocks is not None:
          count = cut(path, leaf.shape, blocks)
          inner_leaves[i], scales[i] = _first(leaf, blocks, coders[signs[name]], count.default)
    return QuantizeState(tree.unflatten(inner_leaves), tree.unflatten(scales))

  def update(updates, state, params=None, **extra_args):
    return explicit.on_auto_axes(step, (updates, state), updates, state, params, extra_args)

  def step(updates, state, params, extra_args):
    leaves, tree = jax.tree.flatten(state.inner)
    scales = tree.flatten_up_to(state.scales)
    stored = [
      x if isinstance(scale, optax.MaskedNode) else blockwise.Packed(x, scale)
      for x, scale in zip(leaves, scales)
    ]
    shapes = [_shape(x, bits) for x in stored]
    belongs = stored_lib.find(state.inner, updates, shapes)
    counts = {
      b.owner: cut(b.path, shapes[i], blockwise.blocks_of(stored[i], bits))
      for i, b in belongs.items()
      if isinstance(stored[i], blockwise.Packed)
    }
    coder = lambda i: coders[signs[belongs[i].name]]

    def decode(i, x):
      return blockwise.dequantise(x, coder(i)) if isinstance(x, blockwise.Packed) else x

    def encode(i, new, old):
      if not isinstance(old, blockwise.Packed):
        return new
      return blockwise.quantise(new, blockwise.blocks_of(old, bits), coder(i))

    updates, stored = stored_lib.update(
      inner,
      updates,
      tree,
      stored,
      params,
      extra_args,
      decode=decode,
      encode=encode,
      owners={i: b.owner for i, b in belongs.items()},
      cuts={k: count for k, count in counts.items() if count.default > 1},
    )
    return updates, QuantizeState(
      tree.unflatten(x.codes if isinstance(x, blockwise.Packed) else x for x in stored),
      tree.unflatten(
        x.scales if isinstance(x, blockwise.Packed) else optax.MaskedNode() for x in stored
      ),
    )

  return Float32(init, update)


def _check(block_size, signs):
  if not isinstance(block_size, int) or block_size < 2 or block_size % 2:
    raise ValueError(f'block_size counts numbers, an even number of them; got {block_size!r}')
  for name, sign in signs.items():
    if sign not in ('signed', 'unsigned', 'keep'):
      raise ValueError(f"signs[{name!r}] must be 'signed', 'unsigned' or 'keep'; got {sign!r}")


def _check_names(belongs, leaves, params, signs, min_size):
  """Refuses state whose sign is not known, and a state without moments."""
  for i, (_, path, name) in belongs.items():
    if _unit_size(path, leaves[i]) >= min_size and name not in signs:
      raise ValueError(
        f'{path}: the inner state keeps {name!r} of shape {leaves[i].shape}, which may have a sign '
        f"or not; say it with signs={{{name!r}: 'signed'}}, 'unsigned', or 'keep' for f32"
      )
  large = [
    path_string(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if _unit_size(path_string(path), leaf) >= min_size
  ]
  if large and not belongs:
    raise ValueError(
      f'the inner state keeps nothing in the shape of its parameters, such as {large[0]}; wrap the '
      'transform that has the moments, as in project(quantize_state(inner), rank)'
    )


def _unit_size(path, leaf) -> int:
  """Numbers of one matrix or vector of a leaf: the same for a stack and for one layer of it."""
  return math.prod(leaf.shape[axis] for axis in unit_axes(path, leaf))


def _first(leaf, blocks, coder, count):
  """Quantises a leaf of the first state, laid out as it is, in `count` slices."""

  def quantise_slice(x):
    # Without the barrier XLA would compute the first state at compile time, for minutes.
    return blockwise.quantise(lax.optimization_barrier(x), blocks, coder)

  def quantise(leaf):
    if count == 1:
      return quantise_slice(leaf)
    made = lax.map(quantise_slice, slices.view(leaf, count))
    like = jax.eval_shape(quantise_slice, leaf)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), made, like)

  like = jax.tree.map(
    lambda x: explicit.lay_out_as(jnp.zeros(x.shape, x.dtype), leaf),
    jax.eval_shape(quantise_slice, leaf),
  )
  return explicit.on_auto_axes(quantise, like, leaf)


def _shape(x, bits):
  """The shape of the moment that is stored as `x`."""
  return blockwise.shape(x, bits) if isinstance(x, blockwise.Packed) else x.shape


def _count(shape, blocks, ways, rows_known) -> slices.Counts:
  """Slices for a leaf of this shape, its axes divided over `ways` devices.

  Rows are cut where `layout` has told that devices do not share them: a slice of shared rows would
  be gathered.
  """
  if len(shape) > 2 and ways[0] > 1:
    return slices.Counts(1, 1)
  rows = 0
  if rows_known and len(shape) > 1 and ways[-2] == 1:
    # Whole blocks, and whole tiles of a TPU's memory, 32 rows of bytes.
    rows = blocks.size if blocks.axis == -2 else 32 if shape[-2] % 32 == 0 else 1
  return slices.count([size // w for size, w in zip(shape, ways)], rows)
