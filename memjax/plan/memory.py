"""The memory of one training step on one device: what its arrays say, and what the compiler says.

Two sources, kept apart: the bytes of the arguments follow from shapes and shardings and are exact;
those of the program are the compiler's own figures.
"""

import math
import pathlib

import jax

from memjax import sharding
from memjax.naming import path_string
from memjax.steps.slices import STACK
from memjax.transforms import project_gradient

_MEMINFO = pathlib.Path('/proc/meminfo')
_CGROUP = pathlib.Path('/sys/fs/cgroup')

HOST_KINDS = ('pinned_host', 'unpinned_host')

# Which part a leaf of optimizer state is counted in, by the names of the state fields around it,
# the outermost first: `left.codes` is a basis, `mu.codes` a moment. Any other is other state.
STATE_PARTS = {
  'basis': {'left', 'right', 'projector', 'projection', 'basis', 'packed', 'rotation', 'sketch'},
  'moments': {
    *('mu', 'nu', 'trace', 'm', 'v', 'ema', 'acc', 'momentum', 'moments', 'exp_avg', 'exp_avg_sq'),
    *('v_row', 'v_col', 'row', 'col', 'rows', 'cols', 'r_row', 'r_col', 'u_row', 'u_col'),
    *('sum_of_squares', 'accumulator', 'factors', 'confidence', 'codes', 'scales'),
  },
}

# Fields of a `memjax.weights.Weight` that are trained beside the weight they adapt.
ADAPTER_FIELDS = {
  *('a', 'b', 'magnitude', 'gate', 'lora_a', 'lora_b', 'left', 'right', 'down', 'up', 'adapter'),
}

ARGUMENT_PARTS = ('parameters', 'adapters', 'basis', 'moments', 'other_state', 'batch')


def argument_parts(state, batch) -> dict[str, int]:
  """Returns bytes in the memory of one device, by part, of the arguments of a training step.

  Leaves of `state` under a key or field `params` are parameters, or adapters where they are a part
  of an adapted weight; the others are optimizer state, told apart by `STATE_PARTS`. What lives in
  host memory is left out; see `host_bytes`.

  Args:
    state: Training state, any pytree of arrays or shapes.
    batch: The other arguments, a pytree of arrays or shapes. A leaf without a sharding is counted
      whole.
  """
  parts = dict.fromkeys(ARGUMENT_PARTS, 0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    parts[part_of(path)] += _bytes(leaf, on_host=False)
  parts['batch'] = sum(_bytes(leaf, on_host=False) for leaf in jax.tree.leaves(batch))
  return parts


def part_of(path) -> str:
  """Returns the part that a leaf of training state at a key path is counted in.

  Only fields of tuples and dataclasses count: the keys of dicts are names of parameters.
  """
  names = [path_string((key,)) for key in path]
  fields = [isinstance(key, jax.tree_util.GetAttrKey) for key in path]
  if 'params' in names[:2]:  # Of a dict, of a TrainState, or of one inside another.
    return 'adapters' if _is_adapter(path) else 'parameters'
  for name, field in zip(names, fields):
    for part, known in STATE_PARTS.items():
      if field and name in known:
        return part
  return 'other_state'


def host_bytes(*trees) -> int:
  """Returns bytes per device that trees of arrays or shapes keep in the host's memory."""
  return sum(_bytes(leaf, on_host=True) for leaf in jax.tree.leaves(trees))


def gradient_bytes(state, *, accumulate: int = 1, layerwise: bool = False) -> int:
  """Returns bytes per device of the gradients that a step forms at once.

  The whole-tree step forms one number for each that is trained, in its dtype; `accumulate > 1`
  keeps their f32 sum beside those of the micro-batch. The layer-by-layer step forms those of one
  layer, then of one other group of parameters; with `accumulate > 1` in f32.

  Args:
    state: Training state as shapes, as in `argument_parts`. Where there are adapters, they alone
      are trained.
    accumulate: Micro-batches an update.
    layerwise: Whether the step is `memjax.steps.layerwise`.
  """
  found = {'parameters': {}, 'adapters': {}}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if (part := part_of(path)) not in found:
      continue
    size = _bytes(leaf, on_host=False)
    in_f32 = size * 4 // leaf.dtype.itemsize
    if accumulate > 1:
      size = in_f32 if layerwise else size + in_f32
    group = _group(path) if layerwise else ''
    if group == STACK:
      size //= leaf.shape[0]
    found[part][group] = found[part].get(group, 0) + size
  return max((found['adapters'] or found['parameters']).values(), default=0)


def projected_bytes(state) -> int:
  """Returns bytes per device of a gradient projected to the bases of a state, in f32."""
  reduced = jax.eval_shape(project_gradient, state['params'], state['opt'])
  # Divided over devices as the parameter is: a projected axis that was divided counts as if it
  # still were.
  each = lambda p, r: _bytes(p, on_host=False) // p.dtype.itemsize * 4 * r.size // p.size
  return sum(jax.tree.leaves(jax.tree.map(each, state['params'], reduced)))


def of_compiled(compiled) -> dict[str, int]:
  """Returns the compiler's own figures, or {} if it gives none.

  Those that begin with `host_` are of the host's memory. Only the TPU's compiler tells it apart; in
  the figures of the others host arguments are arguments like any, and in every peak they are too.
  """
  analysis = compiled.memory_analysis()
  if analysis is None:
    return {}
  figures = ('argument', 'output', 'temp', 'alias', 'generated_code')
  figures += ('host_argument', 'host_output', 'host_temp', 'host_alias')
  sizes = {name: getattr(analysis, f'{name}_size_in_bytes') for name in figures}
  return sizes | {'peak': analysis.peak_memory_in_bytes}


def device_peak(sizes: dict[str, int], platform: str, host: int = 0) -> int:
  """Returns the most bytes of device memory that a compiled step holds at once.

  Args:
    sizes: Of `of_compiled`.
    platform: 'cpu', 'gpu' or 'tpu'. The CPU compiler's peak leaves its temporaries out, so there
      everything counts as alive at once.
    host: Bytes of arguments in host memory, which the compilers' peaks include.
  """
  new = sizes['output'] - sizes['alias']
  at_once = sizes['argument'] + new + sizes['temp'] + sizes['generated_code']
  if platform == 'cpu':
    return at_once - host
  peak = sizes['peak'] - host
  # Of a peak over both memories nobody knows what share is the host's when that changes within a
  # step. Then both figures are upper bounds.
  return min(peak, at_once) if new_on_host(sizes) else peak


def new_on_host(sizes: dict[str, int]) -> int:
  """Returns the bytes that a compiled step takes of the host's memory beside its arguments."""
  return sizes['host_temp'] + sizes['host_output'] - sizes['host_alias']


def counted_arguments(sizes: dict[str, int], host: int = 0) -> int:
  """Returns what the compiler counts for the arguments in device memory; `host` as above."""
  return sizes['argument'] - (0 if sizes['host_argument'] else host)


def limit_bytes(device: jax.Device) -> int | None:
  """Returns the memory of one device, None when nobody says.

  Of a CPU it is what the machine (or the control group this process is in) has available now,
  divided over its virtual devices.
  """
  if stats := device.memory_stats():
    return stats.get('bytes_limit')
  if device.platform != 'cpu' or (available := host_available()) is None:
    return None
  return available // jax.local_device_count(backend='cpu')


def host_available() -> int | None:
  """Returns the bytes of the host's memory that a process can still take, None when nobody says.

  Files that are cached in memory count as free: they give way.
  """
  if not _MEMINFO.is_file():
    return None
  available = _fields(_MEMINFO)['MemAvailable:'] * 2**10
  try:
    top, used = (int((_CGROUP / name).read_text()) for name in ('memory.max', 'memory.current'))
    available = min(available, top - used + _fields(_CGROUP / 'memory.stat')['inactive_file'])
  except (OSError, ValueError, KeyError):  # No such group, or 'max': without a limit.
    pass
  return available


def _fields(file: pathlib.Path) -> dict[str, int]:
  """Name and number of each line of a file that the kernel writes."""
  lines = (line.split() for line in file.read_text().splitlines())
  return {name: int(number) for name, number, *_ in lines}


def check_donated(compiled, state) -> int:
  """Checks that the compiled step writes the new state over the old one, and returns the bytes it
  reuses.

  Raises:
    ValueError: when less than the state is aliased, so that a second copy of the rest would exist.
  """
  need = sum(argument_parts(state, ()).values())
  got = compiled.memory_analysis().alias_size_in_bytes
  if got < need:
    raise ValueError(
      f'the compiled step reuses {got:,} of the {need:,} bytes of its state on each device; jit it '
      'with donate_argnums for the state, and return the state with unchanged shapes and shardings'
    )
  return got


def _group(path) -> str:
  names = [path_string((key,)) for key in path]
  return names[names.index('params') + 1]


def _is_adapter(path) -> bool:
  fields = (path_string((key,)) for key in path if isinstance(key, jax.tree_util.GetAttrKey))
  return any(field in ADAPTER_FIELDS for field in fields)


def _bytes(leaf, on_host: bool) -> int:
  where = getattr(leaf, 'sharding', None)
  if (where is not None and where.memory_kind in HOST_KINDS) != on_host:
    return 0
  if where is None:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
  return sharding.bytes_per_device(leaf, where)
