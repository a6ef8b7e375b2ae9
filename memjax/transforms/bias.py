"""The bias of an average that started at zero."""

import math

import jax
import jax.numpy as jnp


def bias(decay, count):
  """`1 - decay**count`; in f32 the difference itself would keep five digits for 0.999."""
  if isinstance(decay, jax.Array):
    return -jnp.expm1(count * jnp.log(decay))
  return -jnp.expm1(count * math.log(decay)) if decay > 0 else 1.0
