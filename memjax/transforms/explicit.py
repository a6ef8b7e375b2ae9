"""Meshes with Explicit axes: shardings as part of an array's type.

The products of a transform have one natural sharding, which the compiler finds on Auto axes. On
Explicit axes the transform states only what is known: a new update is sharded as the gradient, new
state as the old, and the arithmetic between them runs on Auto axes.
"""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def _is_explicit(x) -> bool:
  return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def on_auto_axes(function, results_like, *args):
  """Calls `function(*args)`; if its arrays live on Explicit axes, on Auto axes.

  Args:
    function: Function of pytrees of arrays.
    results_like: Pytree of arrays with the shapes and the shardings of the results.
    *args: Its arguments.
  """
  if not any(map(_is_explicit, jax.tree.leaves(results_like))):
    return function(*args)
  shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, results_like)
  return jax.sharding.auto_axes(function, out_sharding=shardings)(*args)


def ways(leaf) -> tuple[int, ...]:
  """Devices that each axis of a leaf is divided over, as its type tells: under Explicit axes."""
  if not _is_explicit(leaf):
    return (1,) * leaf.ndim
  shard = jax.typeof(leaf).sharding.shard_shape(leaf.shape)
  return tuple(size // part for size, part in zip(leaf.shape, shard))


def lay_out_as(x, leaf):
  """Shards `x`, whose axes divide as `leaf`'s do, as `leaf`, under Explicit axes only."""
  return jax.sharding.reshard(x, jax.typeof(leaf).sharding) if _is_explicit(leaf) else x


def lay_out_like(x, leaf):
  """Shards `x` as `leaf` on the axes whose size they share, under Explicit axes only.

  Args:
    x: Array of `leaf`'s shape `[..., m, n]` but for one or both of the last two sizes.
    leaf: The parameter.
  """
  if not _is_explicit(leaf):
    return x
  sharding = jax.typeof(leaf).sharding
  spec = [
    axis if size == leaf_size else None
    for axis, size, leaf_size in zip(sharding.spec, x.shape, leaf.shape)
  ]
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
