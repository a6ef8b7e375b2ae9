"""Causal self-attention with grouped queries and rotary positions.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, `N` query heads and `K`
key-value heads of width `H` (`N / K` queries share one key; `N H` may differ from `D`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from memjax.models import query_blocks
from memjax.models.layers import Linear
from memjax.models.rotary import RopeScaling, frequencies, rotate

IMPLEMENTATIONS = ('auto', 'xla', 'cudnn')


class Attention(nnx.Module):
  """`[B, T, D] -> [B, T, D]`.

  The 'xla' implementation holds scores `f32[B, N, T, T]` of one layer, of a block of queries where
  they are many (see `memjax.models.query_blocks`); 'cudnn' none.
  """

  def __init__(
    self,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    rope_theta: float,
    rope_scaling: RopeScaling | None,
    implementation: str,
    dtype: jnp.dtype,
  ):
    self.q = Linear(hidden, heads * head_dim, dtype)
    self.k = Linear(hidden, kv_heads * head_dim, dtype)
    self.v = Linear(hidden, kv_heads * head_dim, dtype)
    self.o = Linear(heads * head_dim, hidden, dtype)
    self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
    self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
    self.implementation = implementation

  def __call__(
    self, x: jax.Array, positions: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """Attends to earlier tokens.

    Args:
      x: Hidden states `[B, T, D]`.
      positions: Rotary positions `i32[B, T]` or `i32[1, T]`.
      mask: `bool[B, T]`, tokens that may be attended to; None for all.
    """
    batch, length, _ = x.shape
    frequency = frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
    query = self.q(x).reshape(batch, length, self.heads, self.head_dim)
    key = self.k(x).reshape(batch, length, self.kv_heads, self.head_dim)
    value = self.v(x).reshape(batch, length, self.kv_heads, self.head_dim)
    # The barrier keeps XLA for TPU from folding the rotation into the product of queries and keys,
    # after which it holds the scores twice: 0.5 GiB for a 7B model on 1 x 2048 tokens.
    query, key = jax.lax.optimization_barrier(
      (rotate(query, positions, frequency), rotate(key, positions, frequency))
    )
    y = attend(query, key, value, mask, self.implementation)
    return self.o(y)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  implementation: str,
) -> jax.Array:
  """Returns what the heads read from earlier tokens, side by side: `[B, T, N H]`.

  Args:
    query: `[B, T, N, H]`.
    key: `[B, T, K, H]`.
    value: `[B, T, K, H]`.
    mask: `bool[B, T]`, tokens that may be attended to; None for all.
    implementation: One of `IMPLEMENTATIONS`.
  """
  query, key = checkpoint_name(query, 'query'), checkpoint_name(key, 'key')
  value = checkpoint_name(value, 'value')
  batch, length, heads, width = query.shape
  if choose(implementation, query.dtype, width, mask is not None) == 'cudnn':
    y = jax.nn.dot_product_attention(
      query,
      key,
      value,
      mask=None if mask is None else mask[:, None, None, :],
      is_causal=True,
      implementation='cudnn',
    )
  else:
    y = query_blocks.attention(query, key, value, mask)
  return checkpoint_name(y.reshape(batch, length, heads * width), 'attention')


def choose(implementation: str, dtype: jnp.dtype, head_dim: int, masked: bool = False) -> str:
  """Resolves 'auto' for the devices of this process: 'cudnn' where its flash attention applies,
  else 'xla'.

  cuDNN needs an Ampere GPU or newer, 16-bit inputs, and a head width that is a multiple of 8 up to
  128 (256 from Hopper on). A padding mask goes to 'xla', since cuDNN would refuse odd lengths with
  one. Compiling for a device that is not there, name the implementation: 'auto' asks the device
  that is.
  """
  if implementation != 'auto':
    return implementation
  device = jax.local_devices()[0]
  if device.platform != 'gpu' or dtype.itemsize != 2 or masked:
    return 'xla'
  # ROCm has no 'major.minor' capability; only CUDA devices come with cuDNN.
  capability = getattr(device, 'compute_capability', '')
  major = int(capability.split('.')[0]) if capability[:1].isdigit() else 0
  widest = 256 if major >= 9 else 128
  return 'cudnn' if major >= 8 and head_dim % 8 == 0 and head_dim <= widest else 'xla'
