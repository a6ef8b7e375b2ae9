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


def place(state: Any, shardings: Any, fraction: float) -> Any:
  """Returns the shardings with the largest leaves of the state moved to the host's memory.

  What is moved is cut across every layer, not by layers: in each of them a part of the update waits
  for the host and a part does not, which is what lets the two overlap.

  Args:
    state: Optimizer state as arrays or shapes.
    shardings: Its `NamedSharding`s.
    fraction: Of the bytes, in [0, 1]; as many leaves are moved as it has room for, and no scalar.

  References:
    Maurya et al., `Deep Optimizer States: Towards Scalable Training of Transformer Models Using
    Interleaved Offloading <https://arxiv.org/abs/2410.21316>`_, 2024 (interleaves whole subgroups
    of parameters, some of which the host itself updates)

  >>> here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  >>> state = {name: jax.ShapeDtypeStruct((n,), 'float32') for name, n in dict(a=3, b=5).items()}
  >>> {name: s.memory_kind for name, s in place(state, {'a': here, 'b': here}, 0.7).items()}
  {'a': 'device', 'b': 'pinned_host'}
  """
  leaves, treedef = jax.tree.flatten(state)
  placed = treedef.flatten_up_to(shardings)
  size = lambda i: math.prod(leaves[i].shape) * leaves[i].dtype.itemsize
  room = fraction * sum(map(size, range(len(leaves))))
  for i in sorted(range(len(leaves)), key=size, reverse=True):
    if leaves[i].ndim and size(i) <= room:
      room -= size(i)
      placed[i] = placed[i].with_memory_kind(HOST)
  return treedef.unflatten(placed)
