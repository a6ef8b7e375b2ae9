"""The receipt of one training step on one target: a dict that is JSON, a table, a sentence.

Sizes are bytes of one device. The fields:

  target, devices               name, and how many devices it has
  fits                          None when the device's limit is not known
  limit_bytes, peak_bytes       device memory there is, and the most the step holds at once
  host_bytes                    host memory of the arguments and, where the compiler tells, of the
                                program's own arrays
  parts                         name -> bytes; they sum to `peak_bytes`
  collectives                   kind -> bytes a step; None when the compiler refused the program, or
                                JAX cannot read what it made
  compile_seconds, cached       of the compile; whether it was read from the disk
  compiled                      the compiler's own figures; {} when it refused the program
  message                       the compiler's words where it refused the program
  notes                         sentences about what the figures leave out
"""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MIB = 2**20
GIB = 2**30

# Part -> what the table calls it, in the order of the table and of the bars.
PARTS = {
  'parameters': 'parameters',
  'adapters': 'adapters',
  'gradients': 'gradients at once',
  'basis': 'basis',
  'moments': 'moments',
  'other_state': 'other optimizer state',
  'batch': 'batch',
  'activations_and_temporaries': 'saved activations and temporaries',
  'new_outputs': 'outputs beside the state',
  'generated_code': 'generated code',
  'layout_padding': 'padding of the arguments to tiles',
  'compiler_reserved': 'reserved by the compiler',
}
_OF_COMPILED = ('new_outputs', 'generated_code', 'layout_padding', 'compiler_reserved')
STATE = ('basis', 'moments', 'other_state')


def receipt(report: dict) -> dict:
  """Returns the receipt of one report of `memjax.plan.compiler.compile_jobs`.

  Args:
    report: `parts` holds the arguments' bytes (`memjax.plan.memory.argument_parts`), `gradients`
      the bytes of the gradients that the step forms at once.

  Raises:
    ValueError: with the report's sentence, when nothing could be compiled.
  """
  if report.get('error'):
    raise ValueError(report['error'])
  arguments = report['parts']
  # A compiler that refuses a program may name its temporaries alone.
  peak = max(report['peak_bytes'], sum(arguments.values()))
  counted, compiled = report['argument_bytes'], report['compiled']
  return {
    'target': report['target'],
    'devices': report['devices'],
    'fits': report['fits'],
    'limit_bytes': report['limit_bytes'],
    'peak_bytes': peak,
    'host_bytes': report['host_bytes'],
    'parts': attribute(peak, arguments, counted, report['gradients'], compiled),
    'collectives': report['collectives'],
    'compile_seconds': round(report['compile_seconds'], 2),
    'cached': report['cached'],
    'compiled': compiled,
    'message': report.get('message'),
    'notes': report.get('notes', []),
  }


def attribute(
  peak: int, arguments: dict[str, int], counted: int | None, gradients: int, compiled: dict
) -> dict[str, int]:
  """Divides the peak into parts, none negative, that sum to it.

  The arguments are exact. What the compiler holds beyond them at the peak is, in this order and
  each up to its total: tiles it pads arguments to, outputs that overwrite no argument, temporaries,
  code (which some peaks leave out). Of the temporaries, gradients are as many as the step forms, at
  most all; the rest are activations and whatever else the program keeps. What the peak holds beyond
  all of this has its own name.

  Args:
    peak: Bytes of device memory.
    arguments: Part -> bytes.
    counted: What the compiler counts for the same arguments; None when it compiled nothing.
    gradients: Bytes of the gradients that the step forms at once.
    compiled: The compiler's figures; {} when it refused the program, where all but the arguments
      counts as temporaries.
  """
  left = peak - sum(arguments.values())
  found = {}
  held = {
    'layout_padding': 0 if counted is None else max(counted - sum(arguments.values()), 0),
    'new_outputs': max(compiled.get('output', 0) - compiled.get('alias', 0), 0),
  }
  temporaries = compiled.get('temp', left)
  held['gradients'] = min(gradients, temporaries)
  held['activations_and_temporaries'] = temporaries - held['gradients']
  held['generated_code'] = compiled.get('generated_code', 0)
  for name, size in held.items():
    found[name] = max(min(size, left), 0)
    left -= found[name]
  parts = arguments | found | {'compiler_reserved': max(left, 0)}
  return {name: parts.get(name, 0) for name in PARTS}


def state_bytes(found: dict) -> int:
  """Returns bytes of optimizer state on a device: what the method adds to the parameters."""
  return sum(found['parts'][name] for name in STATE)


def verdict(found: dict) -> str:
  """Returns one sentence: whether it fits, and by how much."""
  peak, limit = amount(found['peak_bytes']), found['limit_bytes']
  if limit is None:
    return f'{found["target"]}: needs {peak} a device; its limit is not known'
  word = 'fits' if found['fits'] else 'does not fit'
  return f'{found["target"]}: {word}, {peak} of {amount(limit)} a device'


def amount(size: int) -> str:
  """Returns a number of bytes in the unit in which it is read best.

  >>> amount(3 * 2**29), amount(3 * 2**19)
  ('1.50 GiB', '1.50 MiB')
  """
  unit, word = unit_of([size])
  return f'{size / unit:,.2f} {word}'


def table(receipts: list[dict], title: str) -> Table:
  """Returns receipts side by side, a column a target, in GiB of one device or, if all is less, in
  MiB.

  Parts that are zero everywhere have no row.
  """
  unit, word = unit_of(found['peak_bytes'] for found in receipts)
  caption = f'{word} (2**{unit.bit_length() - 1} bytes) of one device'
  out = Table(title=escape(title), title_justify='left', caption=caption)
  out.add_column('part')
  for found in receipts:
    out.add_column(found['target'], justify='right')
  for name, words in PARTS.items():
    sizes = [found['parts'][name] for found in receipts]
    if any(sizes):
      _row(out, words, unit, [_known(found, name) for found in receipts])
  out.add_section()
  _row(out, 'peak', unit, [found['peak_bytes'] for found in receipts])
  _row(out, 'limit', unit, [found['limit_bytes'] for found in receipts])
  fits = {True: '[green]yes[/]', False: '[red]no[/]', None: 'unknown'}
  out.add_row('fits', *(fits[found['fits']] for found in receipts))
  out.add_section()
  if any(found['host_bytes'] for found in receipts):
    _row(out, 'host memory', unit, [found['host_bytes'] for found in receipts])
  moved = [found['collectives'] for found in receipts]
  for kind in sorted({kind for one in moved for kind in one or {}}):
    sizes = [None if one is None else one.get(kind, 0) for one in moved]
    _row(out, f'{kind} a step', unit, sizes)
  out.add_row('compile seconds', *map(_seconds, receipts))
  return out


def unit_of(sizes) -> tuple[int, str]:
  """Returns the unit, in bytes and as a word, in which the largest of some sizes is read best."""
  return (GIB, 'GiB') if max(sizes) >= GIB else (MIB, 'MiB')


def show(receipts: list[dict], title: str) -> None:
  """Prints receipts side by side, and a verdict on each."""
  say = Console(highlight=False, soft_wrap=True).print
  say(table(receipts, title))
  for found in receipts:
    say(escape(verdict(found)))
    for note in found['notes']:
      say(f'  {escape(note)}')


def _known(found: dict, part: str) -> int | None:
  """Bytes of a part; None where a refused program has it among its temporaries."""
  return None if part in _OF_COMPILED and not found['compiled'] else found['parts'][part]


def _row(out: Table, words: str, unit: int, sizes: list) -> None:
  out.add_row(words, *('unknown' if size is None else f'{size / unit:,.2f}' for size in sizes))


def _seconds(found: dict) -> str:
  return f'{found["compile_seconds"]:.1f}' + (' (cached)' if found['cached'] else '')
