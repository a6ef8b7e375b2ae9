"""Self-attention: causal or not, with or without grouped queries, rotary positions and biases.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, `N` query heads and `K`
key-value heads of width `H` (`N / K` queries share one key; `N H` may differ from `D`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from memjax.models import query_blocks
from memjax.models.cache import Cache
from memjax.models.layers import Linear, RMSNorm
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
    implementation: str,
    dtype: jnp.dtype,
    rope_theta: float | None = None,
    rope_scaling: RopeScaling | None = None,
    rotary_dim: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm_eps: float | None = None,
    causal: bool = True,
    window: int | None = None,
  ):
    """Declares the projections.

    Args:
      hidden: Width `D`.
      heads: Query heads `N`.
      kv_heads: Key-value heads `K`.
      head_dim: Head width `H`.
      implementation: One of `IMPLEMENTATIONS`.
      dtype: Of the parameters.
      rope_theta: Base of the rotary wavelengths; None does not rotate.
      rope_scaling: Stretching of slow rotations.
      rotary_dim: Leading dimensions of a head that are rotated; None for all `H`.
      qkv_bias: Whether queries, keys and values have biases.
      out_bias: Whether what the heads read has one after its projection.
      qk_norm_eps: Added to the mean square in the norms of each head's queries and keys, taken
        before they are rotated; None takes none.
      causal: Whether a token attends to earlier ones and itself only.
      window: Tokens that one reads at most, itself and those before it; None for all.
    """
    self.q = Linear(hidden, heads * head_dim, dtype, bias=qkv_bias)
    self.k = Linear(hidden, kv_heads * head_dim, dtype, bias=qkv_bias)
    self.v = Linear(hidden, kv_heads * head_dim, dtype, bias=qkv_bias)
    self.o = Linear(heads * head_dim, hidden, dtype, bias=out_bias)
    self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
    self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
    self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
    self.normed = qk_norm_eps is not None
    if self.normed:
      self.q_norm = RMSNorm(head_dim, qk_norm_eps, dtype)
      self.k_norm = RMSNorm(head_dim, qk_norm_eps, dtype)
    self.implementation, self.causal, self.window = implementation, causal, window

  def __call__(
    self, x: jax.Array, positions: jax.Array | None = None, mask: jax.Array | None = None
  ) -> jax.Array:
    """Attends to other tokens.

    Args:
      x: Hidden states `[B, T, D]`.
      positions: Rotary positions `i32[B, T]` or `i32[1, T]`; None where nothing is rotated.
      mask: `bool[B, T]`, tokens that may be attended to; None for all; or a `Cache`.
    """
    batch, length, _ = x.shape
    query = self.q(x).reshape(batch, length, self.heads, self.head_dim)
    key = self.k(x).reshape(batch, length, self.kv_heads, self.head_dim)
    value = self.v(x).reshape(batch, length, self.kv_heads, self.head_dim)
    if self.normed:
      query, key = self.q_norm(query), self.k_norm(key)
    if self.rope_theta is not None:
      frequency = frequencies(self.rotary_dim, self.rope_theta, self.rope_scaling)
      # The barrier keeps XLA for TPU from folding the rotation into the product of queries and
      # keys, after which it holds the scores twice: 0.5 GiB for a 7B model on 1 x 2048 tokens.
      query, key = jax.lax.optimization_barrier(
        (rotate(query, positions, frequency), rotate(key, positions, frequency))
      )
    y = attend(query, key, value, mask, self.implementation, self.causal, self.window)
    return self.o(y)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | Cache | None,
  implementation: str,
  causal: bool = True,
  window: int | None = None,
) -> jax.Array:
  """Returns what the heads read from other tokens, side by side: `[B, T, N H]`.

  Args:
    query: `[B, T, N, H]`.
    key: `[B, T, K, H]`.
    value: `[B, T, K, H]`.
    mask: `bool[B, T]`, tokens that may be attended to; None for all. Or a `Cache`, whose tokens are
      attended to as well, and which is left these keys and values.
    implementation: One of `IMPLEMENTATIONS`.
    causal: Whether a token attends to earlier ones and itself only.
    window: Tokens that one reads at most, itself and those before it, where it is causal.
  """
  query, key = checkpoint_name(query, 'query'), checkpoint_name(key, 'key')
  value = checkpoint_name(value, 'value')
  batch, length, heads, width = query.shape
  if isinstance(mask, Cache) and mask.slot is not None:
    return mask.read(query, key, value, window).reshape(batch, length, heads * width)
  mask = mask.keep(key, value) if isinstance(mask, Cache) else mask
  if choose(implementation, query.dtype, width, mask is not None) == 'cudnn':
    y = jax.nn.dot_product_attention(
      query,
      key,
      value,
      mask=None if mask is None else mask[:, None, None, :],
      is_causal=causal,
      local_window_size=None if window is None else (window - 1, 0),
      implementation='cudnn',
    )
  else:
    y = query_blocks.attention(query, key, value, mask, causal=causal, window=window)
  return checkpoint_name(y.reshape(batch, length, heads * width), 'attention')


def check(implementation: str) -> None:
  """Raises a `ValueError` for an implementation that does not exist."""
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'attention {implementation!r} is none of {", ".join(IMPLEMENTATIONS)}.')


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
