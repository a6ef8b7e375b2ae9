"""Pools of candidates beside adapted weights, on the device or in the host's memory.

Shapes in this file: a pool holds `c` vectors of width `d`, `[c, d]` or `[L, c, d]` of stacked
layers; q of them, `[..., q]`, are read or written at once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memjax import weights
from memjax.weights.offloaded import fetch


def store(tree: Any) -> Any:
  """Returns arrays in the host's memory; the opposite of `memjax.weights.offloaded.fetch`."""
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def write(pool: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns a pool `[c, d]` on the device with other vectors in places `ids`."""
  return pool.at[ids].set(rows)


def read_host(pool: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns vectors `[..., q, d]` of a pool in the host's memory, fetched one by one."""

  def one(place, rows):
    row = lax.dynamic_slice(pool, _start(place, ids), _row(pool))
    return lax.dynamic_update_slice(rows, fetch(row), _in_order(place, ids))

  rows = jnp.zeros((*ids.shape, pool.shape[-1]), pool.dtype)
  return lax.fori_loop(0, ids.size, one, rows)


def write_host(pool: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
  """Returns a pool in the host's memory with other vectors in places `ids`, in place if donated."""

  def one(place, pool):
    row = lax.dynamic_slice(rows, _in_order(place, ids), _row(rows))
    return lax.dynamic_update_slice(pool, store(row), _start(place, ids))

  return lax.fori_loop(0, ids.size, one, pool)


def without(params: Any) -> Any:
  """Returns adapted parameters without their pools, which only exchanges read."""
  return _of_switched(lambda leaf: dataclasses.replace(leaf, pool_a=None, pool_b=None), params)


def put_back(params: Any, pooled: Any) -> Any:
  """Returns parameters with the pools of others; the opposite of `without`."""
  own = lambda leaf, old: dataclasses.replace(leaf, pool_a=old.pool_a, pool_b=old.pool_b)
  return _of_switched(own, params, pooled)


def on_host(shardings: Any) -> Any:
  """Returns shardings of adapted parameters with those of the pools in the host's memory."""
  kept = lambda s: s.with_memory_kind('pinned_host')
  move = lambda leaf: dataclasses.replace(leaf, pool_a=kept(leaf.pool_a), pool_b=kept(leaf.pool_b))
  return _of_switched(move, shardings)


def _of_switched(function: Callable, tree: Any, *others: Any) -> Any:
  def apply(leaf, *rest):
    return function(leaf, *rest) if isinstance(leaf, weights.Switched) else leaf

  return jax.tree.map(apply, tree, *others, is_leaf=weights.is_weight)


def _row(x):
  return (1,) * (x.ndim - 1) + x.shape[-1:]


def _in_order(place, ids):
  """Where the `place`-th of all vectors begins in `[..., q, d]`."""
  return (*jnp.unravel_index(place, ids.shape), 0)


def _start(place, ids):
  """Where it begins in the pool."""
  at = jnp.unravel_index(place, ids.shape)
  return (*at[:-1], ids[at], 0)
