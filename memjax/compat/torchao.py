"""`torchao` 0.18 (pytorch/ao), its low-bit optimizers."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memjax.compat import flat_blocks
from memjax.compat.flat_blocks import Flat
from memjax.compat.pasted import only_default
from memjax.naming import path_string
from memjax.transforms import units


class AdamAoState(NamedTuple):
  """State of the package's low-bit Adam."""

  count: jax.Array  # i32[], updates seen so far.
  exp_avg: optax.Updates  # First moments: `Flat`, or arrays like the parameters.
  exp_avg_sq: optax.Updates  # Second moments, the same.


def adamw8bit_ao(
  lr: optax.ScalarOrSchedule = 1e-3,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  weight_decay: float = 1e-2,
  amsgrad: bool = False,
  *,
  block_size: int | None = None,
  bf16_stochastic_round: bool = False,
  bits: Literal[8, 4, 'fp8'] = 8,
) -> optax.GradientTransformation:
  """`torchao.optim.AdamW8bit` 0.18, `AdamW4bit` and `AdamWFp8`, on Flax kernels `[..., in, out]`.

  Reproduced:
    - Blocks of the flattened PyTorch weight. A tensor with fewer than 4,096 numbers, or whose
      number the block does not divide, keeps moments in the dtype of the parameter: a bf16 bias
      bf16 ones.
    - Scales of at least 1e-12; codes by the lower neighbour and half the gap, ties up.
    - The 4-bit second moment is linear without a zero: it never vanishes, and is biased up.
    - Neighbours share a byte, the earlier one high.
    - Bias corrections `1 - b**t` in f32, which keep five digits of 1 - 0.999.
    - Decay before the step, `p -= lr wd p`.

  Left out: `amsgrad`, `bf16_stochastic_round`, and the dependence of the size rule on the shard.

  Args:
    lr: Learning rate, or a schedule of the update count.
    betas: Decay rates of the two moments.
    eps: Added to the bias-corrected root.
    weight_decay: Decoupled decay.
    amsgrad: False.
    block_size: 256, for 4 bits 128, if None.
    bf16_stochastic_round: False; `memjax.apply_updates` with a key rounds so.
    bits: 8, 4 or `'fp8'`.

  Returns:
    A transform that needs `params`.

  Raises:
    ValueError: for bits that do not exist, for arguments that are left out, and at `update` without
      `params`.
  """
  only_default('amsgrad', amsgrad, False, 'optax.amsgrad has it, in f32')
  rounded = 'use memjax.apply_updates(params, updates, key=...)'
  only_default('bf16_stochastic_round', bf16_stochastic_round, False, rounded)
  if bits not in (8, 4, 'fp8'):
    raise ValueError(f"bits must be 8, 4 or 'fp8', got {bits!r}")
  b1, b2 = betas
  block = block_size or (128 if bits == 4 else 256)
  tables = [_table(bits, signed) for signed in (True, False)]

  def init(params):
    def first(path, p):
      flat = flat_blocks.flatten(path, p)
      *layers, numbers = flat.shape
      if numbers < 4096 or numbers % block:
        return jnp.zeros_like(p)
      dtype = jnp.float8_e4m3fn if bits == 'fp8' else jnp.uint8
      codes = jnp.zeros((*layers, numbers // 2 if bits == 4 else numbers), dtype)
      return Flat(codes, jnp.zeros((*layers, numbers // block)))

    zeros = lambda: units.map_with_path(first, params)
    return AdamAoState(jnp.zeros([], jnp.int32), zeros(), zeros())

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('weight_decay acts on the weights: call update(updates, state, params)')
    count = optax.safe_increment(state.count)
    rate = lr(state.count) if callable(lr) else lr
    correction1, correction2 = (1 - jnp.float32(b) ** count.astype(jnp.float32) for b in betas)

    def step(path, g, p, avg, avg_sq):
      g, weight = g.astype(jnp.float32), p.astype(jnp.float32)
      read = lambda x, table: _decode(path, x, table, g)
      m, v = read(avg, tables[0]), read(avg_sq, tables[1])
      m, v = m + (1 - b1) * (g - m), v + (1 - b2) * (g * g - v)
      u = m / correction1 / (jnp.sqrt(v) / jnp.sqrt(correction2) + eps)
      moved = -rate * weight_decay * weight - rate * u
      write = lambda new, old, table: _encode(path, new, old, table, block)
      return moved.astype(p.dtype), write(m, avg, tables[0]), write(v, avg_sq, tables[1])

    paths, tree = jax.tree_util.tree_flatten_with_path(updates)
    others = (tree.flatten_up_to(x) for x in (params, state.exp_avg, state.exp_avg_sq))
    made = [step(path_string(path), g, *leaves) for (path, g), *leaves in zip(paths, *others)]
    moved, avg, avg_sq = (tree.unflatten(x) for x in zip(*made))
    return moved, AdamAoState(count, avg, avg_sq)

  return optax.GradientTransformation(init, update)


def _table(bits, signed) -> np.ndarray | None:
  if bits == 'fp8':
    return None
  if bits == 4 and not signed:
    return np.arange(1, 17, dtype=np.float32) / 16
  return flat_blocks.dynamic_map(signed, 7 if bits == 8 else 3)


def quantise(flat: jax.Array, table: np.ndarray | None, block: int) -> Flat:
  """Codes and scales of `OptimState8bit`, `OptimState4bit`, or without a table `OptimStateFp8`."""
  cut = flat_blocks.blocks(flat, block)
  scales = jnp.maximum(jnp.max(jnp.abs(cut), axis=-1), 1e-12)
  if table is None:
    scales = scales / np.float32(jnp.finfo(jnp.float8_e4m3fn).max)
    codes = (cut / scales[..., None]).astype(jnp.float8_e4m3fn)
    return Flat(flat_blocks.join(codes, flat.shape[-1]), scales)
  x = cut / scales[..., None]
  lower = jnp.clip(jnp.searchsorted(jnp.asarray(table), x, side='right') - 1, 0)
  upper = jnp.minimum(lower + 1, len(table) - 1)
  below, above = flat_blocks.lookup(table, lower), flat_blocks.lookup(table, upper)
  codes = jnp.where(x - below >= (above - below) * 0.5, upper, lower).astype(jnp.uint8)
  codes = flat_blocks.join(codes, flat.shape[-1])
  if len(table) == 16:
    codes = codes[..., ::2] << 4 | codes[..., 1::2]
  return Flat(codes, scales)


def dequantise(packed: Flat, table: np.ndarray | None) -> jax.Array:
  """f32[..., N]."""
  codes = packed.codes
  if table is None:
    numbers = codes.astype(jnp.float32)
  else:
    if len(table) == 16:
      codes = jnp.stack([codes >> 4, codes & np.uint8(15)], axis=-1)
      codes = codes.reshape(*codes.shape[:-2], -1)
    numbers = flat_blocks.lookup(table, codes)
  cut = numbers.reshape(*packed.scales.shape, -1)
  return (cut * packed.scales[..., None]).reshape(numbers.shape)


def _decode(path, moment, table, like):
  if not isinstance(moment, Flat):
    return moment.astype(jnp.float32)
  return flat_blocks.unflatten(path, dequantise(moment, table), like)


def _encode(path, moment, old, table, block):
  if not isinstance(old, Flat):
    return moment.astype(old.dtype)
  return quantise(flat_blocks.flatten(path, moment), table, block)
