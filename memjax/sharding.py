"""Where arrays live on a device mesh with the axes `data`, `fsdp` and `tensor`, and for a
zeroth-order step `sides`, of which parameters and batch know nothing.

Parameters follow rules, pairs of (regular expression on the leaf path, `PartitionSpec`): the first
match wins and every leaf must be matched. Everything else is derived: optimizer state from the
parameter it belongs to, the batch from the mesh. A path is the leaf's keys joined by slashes:
`blocks/attn/q/kernel`.
"""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memjax.naming import path_string
from memjax.weights import is_weight, spread, whole

AXES = ('data', 'fsdp', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'))


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, sides: int = 1, devices=None) -> Mesh:
  """Returns a mesh over `devices`, default all; -1 for one axis takes what the others leave.

  With 2 `sides` the mesh has an axis of that name, whose halves hold the same.

  >>> dict(make_mesh(fsdp=2).shape)
  {'data': 4, 'fsdp': 2, 'tensor': 1}

  Raises:
    ValueError: when the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor) | ({'sides': sides} if sides != 1 else {})
  wild = [axis for axis, size in sizes.items() if size == -1]
  if len(wild) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
    raise ValueError(f'mesh {sizes}: sizes are positive, and at most one is -1')
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if wild and len(devices) % fixed == 0:
    sizes[wild[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f'mesh {sizes} takes {fixed} devices{" or a multiple" if wild else ""}, but there are '
      f'{len(devices)}; change config.mesh'
    )
  # Last are the nearest neighbours: sides send each other two numbers.
  axes = AXES if sides == 1 else ('sides', *AXES)
  shape = tuple(sizes[axis] for axis in axes)
  if devices[0].platform == 'tpu':  # Neighbours on the torus become neighbours on the mesh.
    grid = mesh_utils.create_device_mesh(shape, devices)
  else:
    grid = np.asarray(devices).reshape(shape)
  return Mesh(grid, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def param_shardings(params, rules, mesh: Mesh):
  """Returns the sharding of every parameter by the first rule that matches its path.

  Args:
    params: Tree of arrays or shapes.
    rules: Pairs of (regular expression searched in the leaf path, `PartitionSpec`).
    mesh: Mesh with the axes the rules name.

  Raises:
    ValueError: naming a leaf that no rule covers, or whose dimension the mesh does not divide.
  """

  def decide(path, leaf):
    name = path_string(path)
    for pattern, spec in rules:
      if re.search(pattern, name):
        _check_divides(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)
    raise ValueError(f'{name}: shape {leaf.shape} is matched by no sharding rule; add one')

  return jax.tree_util.tree_map_with_path(decide, params)


def weight_shardings(params, shardings):
  """Returns shardings for every array of the parameters.

  The arrays inside a `memjax.weights.Weight` follow the matrix it stands for, as its method
  `spread` says: an `Int8` weight's codes lie as the matrix would, an adapted one's factors each
  along the side they share with it. An axis that the devices do not divide is not divided.

  Args:
    params: Tree of arrays, shapes or weights.
    shardings: Tree of `NamedSharding`, one a parameter.
  """

  def split(leaf, sharding):
    if not is_weight(leaf):
      return sharding
    shape = whole(leaf).shape
    spec, mesh = sharding.spec, sharding.mesh
    entries = _entries(shape, spec)

    def place(x, entries):
      return NamedSharding(mesh, _dividing(x.shape, entries, mesh))

    return jax.tree.map(place, leaf, spread(leaf, entries))

  return jax.tree.map(split, params, shardings, is_leaf=is_weight)


def state_shardings(state, params, shardings):
  """Returns the sharding of every optimizer-state leaf, derived from the parameter it belongs to.

  A state leaf belongs to the parameter whose path ends its own (`0/mu/blocks/attn/q/kernel`). It
  takes that parameter's axes dimension by dimension: a moment all of them, a projected `[..., r,
  n]` leaf the axes of `m` on `r` and of `n` on `n` as far as they divide, a factored `[..., m]`
  leaf those of the dimensions it kept. What belongs to no parameter (counts) is replicated.

  Args:
    state: Optimizer state as arrays or shapes, of `transform.init(params)`.
    params: Tree of arrays or shapes.
    shardings: Tree of `NamedSharding`, one a parameter.
  """
  owners = {}
  for (path, leaf), sharding in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
  ):
    owners[_keys(path)] = (leaf.shape, sharding)
  mesh = next(iter(owners.values()))[1].mesh

  def derive(path, leaf):
    keys = _keys(path)
    for start in range(len(keys) + 1):  # The longest suffix first.
      if keys[start:] in owners:
        shape, sharding = owners[keys[start:]]
        return NamedSharding(mesh, _inherit(leaf.shape, shape, sharding.spec, mesh))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(derive, state)


class Layout:
  """Where what descends from a parameter lives: `layout(path, leaf)` keeps it on its axes.

  The sharding imposed is the one `state_shardings` gives to state of the leaf's shape, so that
  arithmetic between the two moves nothing.
  """

  def __init__(self, params, shardings):
    self._owners = {
      path_string(path): (leaf.shape, sharding)
      for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
      )
    }

  def __call__(self, path: str, leaf):
    return jax.lax.with_sharding_constraint(leaf, self._sharding(path, leaf.shape))

  def along(self, path: str, leaf, axis: int):
    """Returns `leaf` `[d, r]`, whose rows are one of the parameter's axes, with these rows on its
    devices and whole columns: products with the parameter's gradient then gather nothing of it.
    """
    shape, sharding = self._owners[path]
    rows = _entries(shape, sharding.spec)[axis]
    spec = _dividing(leaf.shape, (rows, None), sharding.mesh)
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))

  def ways(self, path: str, shape) -> tuple[int, ...]:
    """Devices that each axis of a leaf of this shape is divided over."""
    sharding = self._sharding(path, shape)
    return tuple(_ways(entry, sharding.mesh) for entry in sharding.spec)

  def _sharding(self, path, shape):
    owner_shape, sharding = self._owners[path]
    return NamedSharding(sharding.mesh, _inherit(shape, owner_shape, sharding.spec, sharding.mesh))


def layout(params, shardings) -> Layout:
  """Returns the layout of what descends from parameters.

  Args:
    params: Tree of arrays or shapes.
    shardings: Tree of `NamedSharding`, one a parameter.
  """
  return Layout(params, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of arrays whose first axis is the batch: over `data` and `fsdp`."""
  return NamedSharding(mesh, BATCH)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, field: str = 'batch_size') -> None:
  """Raises a `ValueError` unless every micro-batch divides over the mesh's batch axes."""
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size // accumulate % ways:
    raise ValueError(
      f'a micro-batch of {batch_size // accumulate} sequences does not divide over data x fsdp = '
      f'{ways} devices; make config.{field} a multiple of {ways * accumulate}'
    )


def bytes_per_device(tree, shardings) -> int:
  """Returns the bytes that one device holds of `tree` (arrays or shapes) under `shardings`."""
  return sum(
    math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
  )


def _keys(path) -> tuple[str, ...]:
  return tuple(path_string((key,)) for key in path)


def _ways(entry, mesh) -> int:
  """Devices that one entry of a `PartitionSpec` (None, an axis, axes) divides a dimension over."""
  return math.prod(mesh.shape[a] for a in ((entry,) if isinstance(entry, str) else entry or ()))


def _check_divides(name, shape, spec, mesh):
  if len(spec) > len(shape):
    raise ValueError(f'{name}: shape {shape} has fewer axes than its sharding rule {spec}')
  for axis, (size, entry) in enumerate(zip(shape, spec)):
    if size % _ways(entry, mesh):
      raise ValueError(
        f'{name}: axis {axis} of shape {shape} does not divide over {entry!r} = '
        f'{_ways(entry, mesh)} devices; change config.mesh'
      )


def _inherit(shape, owner_shape, owner_spec, mesh) -> PartitionSpec:
  """The axes of a parameter's dimensions, on those of a state leaf that descends from them."""
  entries = _entries(owner_shape, owner_spec)
  if len(shape) < len(owner_shape):
    # Factored: keep the dimensions that survived, matched from the left.
    kept, sizes = [], list(zip(owner_shape, entries))
    for size in shape:
      while sizes and sizes[0][0] != size:
        sizes.pop(0)
      kept.append(sizes.pop(0)[1] if sizes else None)
    entries = tuple(kept)
  return _dividing(shape, entries, mesh)


def _entries(shape, spec) -> tuple:
  """One entry of a `PartitionSpec` an axis; what it leaves out is None."""
  return (*spec, *(None,) * (len(shape) - len(spec)))


def _dividing(shape, entries, mesh) -> PartitionSpec:
  """The mesh axes of an array's axes, as far as they divide them."""
  pairs = zip(shape, entries)
  return PartitionSpec(*(e if size % _ways(e, mesh) == 0 else None for size, e in pairs))
