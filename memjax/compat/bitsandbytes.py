"""`bitsandbytes` 0.50 (bitsandbytes-foundation/bitsandbytes)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memjax.compat import flat_blocks
from memjax.compat.flat_blocks import Flat
from memjax.compat.pasted import check_bitsandbytes
from memjax.naming import path_string
from memjax.transforms import units
from memjax.transforms.bias import bias

BLOCK = 256


class Adam8bitState(NamedTuple):
  """State of the package's 8-bit Adam."""

  count: jax.Array  # i32[], updates seen so far.
  state1: optax.Updates  # First moments: `Flat`, or f32 in the parameter's shape.
  state2: optax.Updates  # Second moments, the same.


def adamw8bit(
  lr: optax.ScalarOrSchedule = 1e-3,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  weight_decay: float = 1e-2,
  amsgrad: bool = False,
  optim_bits: int = 32,
  args: None = None,
  min_8bit_size: int = 4096,
  is_paged: bool = False,
  *,
  backend: Literal['cuda', 'cpu'] = 'cuda',
) -> optax.GradientTransformation:
  """`bitsandbytes.optim.AdamW8bit` 0.50, on Flax kernels `[..., in, out]`.

  Reproduced:
    - Blocks of 256 neighbours of the flattened PyTorch weight, the last one ragged; each layer of a
      stacked leaf is a tensor of its own.
    - Tensors with fewer than `min_8bit_size` numbers keep f32 moments.
    - The dynamic maps as tables: no -1, so that a block whose extreme is negative decodes to 0.993
      of it.
    - On CUDA, weights decay after the step, `p = (p - lr u) (1 - lr wd)`; on the CPU before it.
    - On CUDA, a gradient that is not finite zeroes both its moments and leaves its weight.
    - On CUDA, a first moment whose code would have the other sign moves by a code towards its own.
    - `Adam8bit(weight_decay=...)` is this too: the package has one kernel.

  Left out:
    - CUDA's fast division and powers, an ulp or two of f32.
    - The look-up tables that the CPU kernel of 0.50 rounds by: it codes zero as 5.5e-6. Here codes
      are the nearest, as in the package's PyTorch reference.
    - `max_unorm`, `skip_zeros`, `is_paged` and the overrides a module or in `args`.

  Args:
    lr: Learning rate, or a schedule of the update count.
    betas: Decay rates of the two moments.
    eps: Added to the bias-corrected root.
    weight_decay: Decoupled decay.
    amsgrad: False.
    optim_bits: 32.
    args: None.
    min_8bit_size: See above.
    is_paged: False.
    backend: Whose order of operations.

  Returns:
    A transform that needs `params`.

  Raises:
    ValueError: for a backend that does not exist, for arguments that are left out, and at `update`
      without `params`.
  """
  check_bitsandbytes(amsgrad, optim_bits, args, is_paged)
  if backend not in ('cuda', 'cpu'):
    raise ValueError(f"backend must be 'cuda' or 'cpu', got {backend!r}")
  adam = scale_by_adam8bit(betas, eps, min_8bit_size, backend=backend)

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('weight_decay acts on the weights: call update(updates, state, params)')
    rate = lr(state.count) if callable(lr) else lr

    def move(u, p, g):
      step, decay = rate * u, rate * weight_decay
      if backend == 'cpu':
        return -decay * p - step
      return jnp.where(jnp.isfinite(g), -step - decay * (p - step), 0)

    scaled, state = adam.update(updates, state)
    cast = lambda u, p, g: move(u, p.astype(jnp.float32), g).astype(p.dtype)
    return jax.tree.map(cast, scaled, params, updates), state

  return optax.GradientTransformation(adam.init, update)


def scale_by_adam8bit(
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  min_8bit_size: int = 4096,
  *,
  backend: Literal['cuda', 'cpu'] = 'cuda',
) -> optax.GradientTransformation:
  """The package's Adam kernel without learning rate and decay; see `adamw8bit`."""
  b1, b2 = betas
  maps = [flat_blocks.dynamic_map(signed) for signed in (True, False)]

  def init(params):
    def first(path, p):
      flat = flat_blocks.flatten(path, p)
      if flat.shape[-1] < min_8bit_size:
        return jnp.zeros(p.shape, jnp.float32)
      scales = (*flat.shape[:-1], -(-flat.shape[-1] // BLOCK))
      return Flat(jnp.zeros(flat.shape, jnp.uint8), jnp.zeros(scales))

    zeros = lambda: units.map_with_path(first, params)
    return Adam8bitState(jnp.zeros([], jnp.int32), zeros(), zeros())

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    correction1, correction2 = bias(b1, count), jnp.sqrt(bias(b2, count))

    def step(path, g, state1, state2):
      g = g.astype(jnp.float32)
      m = b1 * _decode(path, state1, maps[0], g) + (1 - b1) * g
      v = b2 * _decode(path, state2, maps[1], g) + (1 - b2) * g * g
      if backend == 'cuda':
        m, v = (jnp.where(jnp.isfinite(g), x, 0) for x in (m, v))
      u = correction2 / correction1 * (m / (jnp.sqrt(v) + eps * correction2))
      return (
        u,
        _encode(path, m, state1, maps[0], keep_sign=backend == 'cuda'),
        _encode(path, v, state2, maps[1]),
      )

    paths, tree = jax.tree_util.tree_flatten_with_path(updates)
    moments = (tree.flatten_up_to(x) for x in (state.state1, state.state2))
    made = [step(path_string(path), g, *leaves) for (path, g), *leaves in zip(paths, *moments)]
    u, state1, state2 = (tree.unflatten(x) for x in zip(*made))
    return u, Adam8bitState(count, state1, state2)

  return optax.GradientTransformation(init, update)


def quantise(flat: jax.Array, table: np.ndarray, keep_sign: bool = False) -> Flat:
  """`quantize_blockwise` of the package's PyTorch reference: the nearest code, ties down."""
  cut = flat_blocks.blocks(flat, BLOCK)
  scales = jnp.max(jnp.abs(cut), axis=-1)
  x = jnp.clip(cut * (1 / jnp.where(scales == 0, 1, scales))[..., None], -1, 1)
  middles = (table[:-1] + table[1:]) / np.float32(2)
  codes = jnp.searchsorted(jnp.asarray(middles), x, side='left').astype(jnp.int32)
  if keep_sign:
    wrong = jnp.signbit(flat_blocks.lookup(table, codes)) != jnp.signbit(x)
    codes = jnp.where(wrong, codes + jnp.where(x > 0, 1, -1), codes)
  return Flat(flat_blocks.join(codes.astype(jnp.uint8), flat.shape[-1]), scales)


def dequantise(packed: Flat, table: np.ndarray) -> jax.Array:
  """`dequantize_blockwise`: f32[..., N]."""
  numbers = flat_blocks.blocks(flat_blocks.lookup(table, packed.codes), BLOCK)
  return flat_blocks.join(numbers * packed.scales[..., None], packed.codes.shape[-1])


def _decode(path, moment, table, like):
  if not isinstance(moment, Flat):
    return moment
  return flat_blocks.unflatten(path, dequantise(moment, table), like)


def _encode(path, moment, old, table, keep_sign=False):
  if not isinstance(old, Flat):
    return moment
  return quantise(flat_blocks.flatten(path, moment), table, keep_sign)
