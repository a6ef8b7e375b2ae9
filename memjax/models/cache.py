"""Keys and values that earlier tokens left, for one layer and the length of one call of its block.

Shapes in this file: `B` sequences, `S` slots of which a prompt fills the first `P`; `K` key-value
heads of width `H`.
"""

import jax
import jax.numpy as jnp


class Cache:
  """Takes the place of a mask: what attends with it reads the slots, and leaves its own in it.

  A block passes its mask to `memjax.models.attention.attend` and to nothing else, so that no family
  needs to know of caches. Not a pytree: made, used and dropped within one trace of a block.

  Attributes:
    keys: `[B, S, K, H]`; read unless it is the prompt that comes in.
    values: `[B, S, K, H]`.
    allowed: `bool[B, S]`, slots that may be attended to once they are filled.
    slot: `i32[]`, where the one token that comes in goes; None when it is the prompt.
    key: What came in, `[B, t, K, H]`; None before.
    value: Likewise.
  """

  def __init__(
    self, keys: jax.Array, values: jax.Array, allowed: jax.Array, slot: jax.Array | None
  ):
    self.keys, self.values, self.allowed, self.slot = keys, values, allowed, slot
    self.key = self.value = None

  def read(
    self, query: jax.Array, key: jax.Array, value: jax.Array, window: int | None
  ) -> jax.Array:
    """Returns what the heads of one token read from the slots up to its own: `[B, 1, N, H]`."""
    self.key, self.value = key, value
    start = (0, self.slot, 0, 0)
    keys = jax.lax.dynamic_update_slice(self.keys, key, start)
    values = jax.lax.dynamic_update_slice(self.values, value, start)
    before = self.slot - jnp.arange(keys.shape[1])
    near = (before >= 0) if window is None else (before >= 0) & (before < window)
    mask = (self.allowed & near[None, :])[:, None, None, :]
    return jax.nn.dot_product_attention(query, keys, values, mask=mask, implementation='xla')

  def keep(self, key: jax.Array, value: jax.Array) -> jax.Array:
    """Keeps the keys and values of a prompt, and returns its mask, `bool[B, P]`."""
    self.key, self.value = key, value
    return self.allowed[:, : key.shape[1]]
