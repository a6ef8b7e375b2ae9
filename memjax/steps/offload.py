"""Optimizer state in the host's memory, from where one unit of it at a time visits the device.

A unit is what a layer-by-layer step updates at once: one layer, the embedding, or what the head
reads. State leaves are `[L, ...]` for the `L` layers, and the embedding's and the head's own.
"""

import math
from typing import Any

import jax

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


def place(state: Any, shardings: Any, slots: list, fraction: float) -> Any:
  """Returns the shardings with the largest leaves of the state moved to the host's memory.

  What is moved is cut across every layer, not by layers: in each of them a part of the update waits
  for the host and a part does not, which is what lets the two overlap.

  Args:
    state: Optimizer state as arrays or shapes.
    shardings: Its `NamedSharding`s.
    slots: What its leaves belong to, see `slices.plan`; counts and the like stay.
    fraction: Of the bytes, in [0, 1]; as many leaves are moved as it has room for.

  References:
    Maurya et al., `Deep Optimizer States: Towards Scalable Training of Transformer Models Using
    Interleaved Offloading <https://arxiv.org/abs/2410.21316>`_, 2024 (interleaves whole subgroups
    of parameters, some of which the host itself updates)
  """
  is_leaf = lambda x: x is None  # State that is not kept.
  leaves, treedef = jax.tree.flatten(state, is_leaf=is_leaf)
  placed = jax.tree.leaves(shardings, is_leaf=is_leaf)
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
