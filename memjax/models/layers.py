"""The small layers that model families share: linear maps, norms, embeddings, gated MLPs.

Shapes in this file: `B` sequences of `T` tokens, hidden width `D`, MLP width `F`, vocabulary `V`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from memjax import weights
from memjax.models.module import declare


def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, `x Phi(x)`, in f32 (Hendrycks & Gimpel, 2016).

  By erf where `jax.nn.gelu` takes erfc, which on a CPU costs an MLP two thirds more time, forward
  and backward. Differs from it by less than 1e-6.
  """
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS = {
  'relu': jax.nn.relu,
  'gelu': gelu,
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


class Linear(nnx.Module):
  """`[..., m] -> [..., n]`, with or without bias."""

  def __init__(self, inputs: int, outputs: int, dtype: jnp.dtype, bias: bool = False):
    self.kernel = declare(inputs, outputs, dtype=dtype)
    if bias:
      self.bias = declare(outputs, dtype=dtype)
    self.biased = bias

  def __call__(self, x: jax.Array) -> jax.Array:
    y = weights.dot(x, self.kernel.get_value())
    return _add_row(y, self.bias.get_value()) if self.biased else y


class Embed(nnx.Module):
  """Token ids `i32[B, T]` to rows `[B, T, D]`, and back to logits when a head is tied to it."""

  def __init__(self, vocab: int, hidden: int, dtype: jnp.dtype):
    self.embedding = declare(vocab, hidden, dtype=dtype)

  def __call__(self, ids: jax.Array) -> jax.Array:
    return weights.take(self.embedding.get_value(), ids)

  def attend(self, x: jax.Array) -> jax.Array:
    """Returns `[B, T, V]`: the product of every hidden state with every row."""
    return weights.dot(x, self.embedding.get_value(), transpose=True)


class RMSNorm(nnx.Module):
  """Root mean square norm of `[..., D]` over its last axis, in f32 (Zhang & Sennrich, 2019)."""

  def __init__(self, hidden: int, eps: float, dtype: jnp.dtype):
    self.scale = declare(hidden, dtype=dtype)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = weights.materialize(self.scale.get_value()).astype(jnp.float32)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * jnp.expand_dims(scale, range(y.ndim - 1))).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Norm of `[B, T, D]` over its last axis, with scale and bias, in f32 (Ba et al., 2016)."""

  def __init__(self, hidden: int, eps: float, dtype: jnp.dtype):
    self.scale = declare(hidden, dtype=dtype)
    self.bias = declare(hidden, dtype=dtype)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = weights.materialize(self.scale.get_value()).astype(jnp.float32)
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return _add_row(y * scale[None, None, :], self.bias.get_value()).astype(x.dtype)


class MLP(nnx.Module):
  """`down(activation(up(x)))`, with biases; `activation` is a key of `ACTIVATIONS`."""

  def __init__(self, hidden: int, intermediate: int, dtype: jnp.dtype, activation: str = 'relu'):
    self.up = Linear(hidden, intermediate, dtype, bias=True)
    self.down = Linear(intermediate, hidden, dtype, bias=True)
    self.activation = activation

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(ACTIVATIONS[self.activation](self.up(x)))


class GatedMLP(nnx.Module):
  """`down(silu(gate(x)) * up(x))`: SwiGLU (Shazeer, 2020)."""

  def __init__(self, hidden: int, intermediate: int, dtype: jnp.dtype):
    self.gate = Linear(hidden, intermediate, dtype)
    self.up = Linear(hidden, intermediate, dtype)
    self.down = Linear(intermediate, hidden, dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def _add_row(x: jax.Array, row) -> jax.Array:
  """Adds a bias `[D]` to every row of `[..., D]`, in the dtype of `x`."""
  row = weights.materialize(row).astype(x.dtype)
  return x + jnp.expand_dims(row, range(x.ndim - 1))
