"""The memory of one training step on one device, part by part.

Two sources, kept apart: what the arrays' shapes and shardings say (exact), and what the compiler
says of the program.
"""

import jax
from rich.table import Table

from memjax import sharding
from memjax.transforms.paths import path_string

MIB = 2**20

# Which part a state leaf is counted in, by the name of the state field that holds it; any other
# field is other state.
PARTS = {
  'basis': {'left', 'right', 'projector', 'basis'},
  'moments': {'mu', 'nu', 'trace', 'm', 'v', 'v_row', 'v_col', 'ema', 'acc'},
}


def measure(state, shardings, batch, batch_shardings, compiled=None) -> dict:
  """Returns bytes per device of one training step, as a dict that can be written as JSON.

  Args:
    state: Training state as arrays or shapes.
    shardings: Its shardings.
    batch: Dict of arrays or shapes.
    batch_shardings: Their shardings.
    compiled: The compiled step, for the compiler's own figures; None leaves them out.

  Returns:
    `parts`: name -> bytes of parameters, gradients (one a parameter, in its dtype), basis, moments,
    other_state, batch; `compiled`: argument, output, temp, alias, peak and generated_code as the
    compiler counts them.
  """
  parts = {
    'parameters': sharding.bytes_per_device(state['params'], shardings['params']),
    'gradients': sharding.bytes_per_device(state['params'], shardings['params']),
    'basis': 0,
    'moments': 0,
    'other_state': 4,  # The count of finished steps.
    'batch': sharding.bytes_per_device(batch, batch_shardings),
  }
  paths = jax.tree_util.tree_leaves_with_path(state['opt'])
  for (path, leaf), where in zip(paths, jax.tree.leaves(shardings['opt']), strict=True):
    parts[_part_of(path)] += sharding.bytes_per_device(leaf, where)
  return {'unit': 'bytes per device', 'parts': parts, 'compiled': _compiled(compiled)}


def table(receipt: dict, title: str) -> Table:
  """Returns the receipt of `measure` as a table to print, in MiB (2**20 bytes) per device."""
  out = Table(title=title, title_justify='left')
  out.add_column('part')
  out.add_column('MiB / device', justify='right')
  for group in ('parts', 'compiled'):
    for name, size in receipt[group].items():
      words = name.replace('_', ' ')
      out.add_row(words if group == 'parts' else f'compiled: {words}', f'{size / MIB:,.2f}')
    out.add_section()
  return out


def check_donated(compiled, state, shardings) -> int:
  """Checks that the compiled step writes the new state over the old one, and returns the bytes it
  reuses.

  Raises:
    ValueError: when less than the state is aliased, so that a second copy of the rest would exist.
  """
  need = sharding.bytes_per_device(state, shardings)
  got = compiled.memory_analysis().alias_size_in_bytes
  if got < need:
    raise ValueError(
      f'the compiled step reuses {got:,} of the {need:,} bytes of its state on each device; jit it '
      'with donate_argnums for the state, and return the state with unchanged shapes and shardings'
    )
  return got


def _part_of(path) -> str:
  names = {path_string((key,)) for key in path if isinstance(key, jax.tree_util.GetAttrKey)}
  return next((part for part, fields in PARTS.items() if fields & names), 'other_state')


def _compiled(compiled) -> dict[str, int]:
  if compiled is None or (analysis := compiled.memory_analysis()) is None:
    return {}
  return {
    'argument': analysis.argument_size_in_bytes,
    'output': analysis.output_size_in_bytes,
    'temp': analysis.temp_size_in_bytes,
    'alias': analysis.alias_size_in_bytes,
    'peak': analysis.peak_memory_in_bytes,
    'generated_code': analysis.generated_code_size_in_bytes,
  }
