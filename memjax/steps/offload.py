"""Optimizer state in the host's memory, from where one unit of it at a time visits the device.

A unit is what a layer-by-layer step updates at once: one layer, the embedding, or what the head
reads. State leaves are `[L, ...]` for the `L` layers, and the embedding's and the head's own.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

HOST, DEVICE = 'pinned_host', 'device'


def on_host(sharding) -> bool:
  """Whether arrays of this sharding (None for the compiler's choice) lie in the host's memory."""
  return sharding is not None and sharding.memory_kind == HOST


def fetch(x: jax.Array, sharding) -> jax.Array:
  """Returns on the device what lies where `sharding` says; what is there already is not moved."""
  return jax.device_put(x, sharding.with_memory_kind(DEVICE)) if on_host(sharding) else x


def store(x: jax.Array, sharding) -> jax.Array:
  """The opposite of `fetch`."""
  return jax.device_put(x, sharding) if on_host(sharding) else x


def place(state: Any, shardings: Any, treedef, slots: list, fraction: float) -> Any:
  """Returns the shardings with the largest leaves of the state moved to the host's memory.

  What is moved is cut across every layer, not by layers: in each of them a part of the update waits
  for the host and a part does not, which is what lets the two overlap.

  Args:
    state: Optimizer state as arrays or shapes.
    shardings: Its `NamedSharding`s.
    treedef: Structure of `transform.init`; where a leaf of it is None, the state is not kept.
    slots: What its leaves belong to, see `slices.plan`; counts and the like stay.
    fraction: Of the bytes, in [0, 1]; as many leaves are moved as it has room for.

  References:
    Maurya et al., `Deep Optimizer States: Towards Scalable Training of Transformer Models Using
    Interleaved Offloading <https://arxiv.org/abs/2410.21316>`_, 2024 (interleaves whole subgroups
    of parameters, some of which the host itself updates)
  """
  leaves, placed = treedef.flatten_up_to(state), treedef.flatten_up_to(shardings)
  sizes = {
    i: math.prod(x.shape) * x.dtype.itemsize
    for i, (x, slot) in enumerate(zip(leaves, slots, strict=True))
    if x is not None and not slot.shared
  }
  room = fraction * sum(sizes.values())
  for i in sorted(sizes, key=sizes.get, reverse=True):
    if sizes[i] <= room:
      room -= sizes[i]
      placed[i] = placed[i].with_memory_kind(HOST)
  return treedef.unflatten(placed)


def store_all(state: Any, shardings: Any, treedef, slots: list) -> Any:
  """Returns fresh state with every leaf where its sharding says; under `jit`.

  What goes to the host goes there a layer at a time. Of leaves that begin as a constant, as moments
  do, no more than a layer is ever on the device; the compiler makes each layer where it is sent.

  Args:
    state: Optimizer state, of `transform.init`.
    shardings: Its `NamedSharding`s, of `place`.
    treedef: As there.
    slots: What its leaves belong to, see `slices.plan`.
  """

  def store_leaf(x, sharding, slot):
    if x is None or not on_host(sharding):
      return x
    if not slot.layered:
      return store(x, sharding)
    layer = jax.NamedSharding(sharding.mesh, P(*sharding.spec[1:]), memory_kind=HOST)
    return jax.lax.map(lambda i: store(x[i], layer), jnp.arange(x.shape[0]))

  leaves, placed = treedef.flatten_up_to(state), treedef.flatten_up_to(shardings)
  return treedef.unflatten(map(store_leaf, leaves, placed, slots))
