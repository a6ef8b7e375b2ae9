"""How hidden states lie over a mesh, where the compiler left alone would gather or reduce too much.

Shapes in this file: hidden states `[B, T, D]`, whose layout is a `NamedSharding` with spec `P(batch
axes, ...)`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P


def batch_axes(layout: Sharding | None) -> tuple[str, ...]:
  """Returns the mesh axes over which the batch is split.

  >>> from jax.sharding import AxisType
  >>> mesh = jax.make_mesh((1, 1), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  >>> batch_axes(NamedSharding(mesh, P(('data', 'fsdp'))))
  ('data', 'fsdp')
  """
  first = layout.spec[0] if isinstance(layout, NamedSharding) and len(layout.spec) else None
  return first if isinstance(first, tuple) else () if first is None else (first,)


def spread_lookup(x: jax.Array, layout: Sharding | None) -> jax.Array:
  """Moves looked-up rows `[B, T, D]` from the embedding's layout to that of hidden states.

  A table whose columns are split over the last batch axis ('fsdp') yields rows split the same way.
  Said in one step, the compiler replicates them first; with this stop on the way, `D` split and `B`
  not, it is one all-to-all along that axis.
  """
  axes = batch_axes(layout)
  if not axes:
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout)
  if x.shape[2] % layout.mesh.shape[axes[-1]] == 0:
    halfway = NamedSharding(layout.mesh, P(axes[:-1] or None, None, axes[-1]))
    x = jax.lax.with_sharding_constraint(x, halfway)
  return jax.lax.with_sharding_constraint(x, layout)


def sum_over_batch(
  f: Callable[..., tuple[jax.Array, ...]], layout: Sharding | None
) -> Callable[..., tuple[jax.Array, ...]]:
  """Returns `f`, run on each device's part of the batch, its scalars summed at the end.

  For an `f` that loops over its tokens: parameters are gathered once before the loop and their
  gradient reduced once after it, where the compiler would do both in every turn. Costs each device
  one gathered copy of `params`, which a single turn of the loop needs anyway. Mesh axes that do not
  split the batch ('tensor') stay with the compiler.

  Args:
    f: Maps any pytree and arrays `[B, ...]` to scalars.
    layout: Of hidden states; None runs `f` as it is.
  """
  axes = batch_axes(layout)
  if math.prod(layout.mesh.shape[axis] for axis in axes) == 1:  # Also without axes.
    return f

  def summed(params, *arrays):
    dtypes = jax.tree.map(lambda x: x.dtype, params)

    def local(params, *arrays):
      params = jax.tree.map(_as, params, dtypes)
      return jax.tree.map(lambda s: s[None], f(params, *arrays))

    # A gradient in 16 bits, summed over some axes of a mesh, ends the process on a CPU (XLA's
    # AllReducePromotion takes no reduction that JAX has noted a layout in).
    if isinstance(layout.mesh, Mesh) and layout.mesh.devices.flat[0].platform == 'cpu':
      params = jax.tree.map(_widen, params)
    # check_vma=False: with it, jax marks `params` as varying where they are used, inside the loop,
    # and so reduces there.
    # None is the mesh of the `shard_map` around: there each side of a zeroth-order step has a half.
    around = jax.sharding.get_abstract_mesh()
    sums = jax.shard_map(
      local,
      mesh=None if around.manual_axes else layout.mesh,
      in_specs=(P(), *[P(axes)] * len(arrays)),
      out_specs=P(axes),
      axis_names=set(axes),
      check_vma=False,
    )(params, *arrays)
    return jax.tree.map(jnp.sum, sums)

  return summed


def _widen(x):
  """An array in at least 32 bits, if it is one of floating point."""
  is_float = jnp.issubdtype(x.dtype, jnp.floating)
  return _as(x, jnp.promote_types(x.dtype, jnp.float32)) if is_float else x


def _as(x, dtype):
  return x if x.dtype == dtype else x.astype(dtype)
