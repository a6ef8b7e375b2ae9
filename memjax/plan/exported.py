"""A user's own jitted step, carried to another process as a file.

`jax.export` keeps the program. It keeps neither what is donated, nor containers that it does not
know, nor the memory that the arguments of one device live in: the step is exported over its flat
leaves, and the job says of each whether it may be overwritten and where it is.
"""

import pathlib

import jax
import numpy as np
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_PLATFORMS = {'tpu': 'tpu', 'gpu': 'cuda'}  # As jax.export calls them.


def export_job(step, arguments: tuple, target, path) -> dict:
  """Writes a jitted step to `path` and returns the job that compiles it for a target.

  Args:
    step: A jitted function; what its `donate_argnums` covers stays donated.
    arguments: Its arguments as shapes, with `NamedSharding`s over a mesh (an
      `jax.sharding.AbstractMesh` will do) of as many devices as the target has; without shardings
      for a target of one device.
    target: A `memjax.plan.targets.Target`.
    path: File to write.

  Raises:
    ValueError: when the step is not jitted, when the arguments' meshes are not of the target's
    size, or when the package that writes exported programs is missing.
  """
  if not hasattr(step, 'trace'):
    raise ValueError('the step is not jitted; use jax.jit, with donate_argnums for the state')
  traced = step.trace(*arguments)
  flags, _ = traced.args_info
  donated = [i for i, leaf in enumerate(jax.tree.leaves(flags)) if leaf.donated]
  leaves, tree = jax.tree.flatten(arguments)
  flat = jax.jit(
    lambda *leaves: jax.tree.leaves(step(*jax.tree.unflatten(tree, leaves))), keep_unused=True
  )
  platform = jax.default_backend() if target.platform == 'local' else target.platform
  exported = export.export(flat, platforms=[_PLATFORMS.get(platform, platform)])(*leaves)
  mesh = _mesh_of(leaves)
  if exported.nr_devices != target.devices:
    raise ValueError(
      f'{target.name} has {target.devices} devices, but the shardings of the arguments are over '
      f'{exported.nr_devices}; make their mesh of {target.devices} devices (an AbstractMesh needs '
      'none)'
    )
  try:
    pathlib.Path(path).write_bytes(exported.serialize())
  except ImportError as e:
    raise ValueError(
      f"{target.name}: flatbuffers is not installed; pip install 'memjax[plan]'"
    ) from e
  return {
    'target': target.name,
    'exported': str(path),
    'donated': donated,
    'mesh': {'sizes': list(mesh.axis_sizes), 'names': list(mesh.axis_names)} if mesh else None,
    'shardings': [_write_sharding(leaf) for leaf in leaves],
  }


def load(job: dict, devices) -> tuple:
  """Returns the jitted step of a job over `devices`, its arguments as shapes, and the same over an
  abstract mesh, which keeps memory kinds that the devices cannot tell.
  """
  exported = export.deserialize(bytearray(pathlib.Path(job['exported']).read_bytes()))
  sizes, names = (job['mesh'] or {'sizes': [len(devices)], 'names': ['data']}).values()
  grid = np.asarray(devices).reshape(sizes)
  mesh = Mesh(grid, tuple(names), axis_types=(AxisType.Auto,) * len(names))
  leaves, intended = (
    [
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_read_sharding(over, fields))
      for x, fields in zip(exported.in_avals, job['shardings'], strict=True)
    ]
    for over in (mesh, mesh.abstract_mesh)
  )
  where = [leaf.sharding for leaf in leaves]
  step = jax.jit(exported.call, donate_argnums=job['donated'], in_shardings=where)
  return step, leaves, intended


def _write_sharding(leaf) -> dict | None:
  where = getattr(leaf, 'sharding', None)
  if where is None:
    return None
  spec = list(where.spec) if isinstance(where, NamedSharding) else []
  return {'spec': spec, 'memory_kind': where.memory_kind}


def _read_sharding(mesh, fields) -> NamedSharding:
  if fields is None:
    return NamedSharding(mesh, PartitionSpec())
  # JSON has no tuples: a list is a dimension over several axes.
  spec = (tuple(entry) if isinstance(entry, list) else entry for entry in fields['spec'])
  return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=fields['memory_kind'])


def _mesh_of(leaves):
  shardings = [getattr(leaf, 'sharding', None) for leaf in leaves]
  return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
