"""Compiles one program for one target and reads from it what a run would need."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import time
import traceback

import jax
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from memjax import build, optimizers, sharding, weights
from memjax.plan import collectives, exported, memory, targets

_VERSIONED = (
  *('jax', 'jaxlib', 'libtpu', 'jax-cuda12-plugin', 'jax-cuda12-pjrt'),
  *('jax-cuda13-plugin', 'jax-cuda13-pjrt'),
)
_OPTIONS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')  # Of the environment, that change what is compiled.
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_NUMBER = r'([\d.]+)([KMGT]?)'
_HBM_OOM = (
  re.compile(rf'\({_NUMBER}\) exceeds available HBM \({_NUMBER}\)'),
  re.compile(rf'Used {_NUMBER} of {_NUMBER} hbm'),
)
# The code is thrown away, so that it need not be fast: half the time, and the same buffers.
_FAST = {'xla_backend_optimization_level': 0, 'xla_gpu_disable_gpuasm_optimizations': True}
FRACTIONS = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')  # New name and old.
PREALLOCATED = 0.75  # Of a card's memory, by that variable's default.
_TIGHT = 0.93  # Of a card's memory: what a real card may not have, though the receipt fits.
_FOUND = {'compiled', 'collectives', 'loops_counted_once', 'compile_seconds', 'message'}
MESSAGE = 2000  # Characters of the compiler's words that a report keeps.


def report(job: dict) -> dict:
  """Compiles a job and returns its report; a refusal is a report too, see `failed`.

  Args:
    job: `target` (a name) and either `config` (a run's config as a dict) or what
      `exported.export_job` returned; `cache_dir`, a directory or None for none.

  Returns:
    A dict that can be written as JSON: `target`, `platform`, `devices`, `fits` (None when nobody
    knows the limit, or nothing was compiled), `limit_bytes`, `peak_bytes` and `host_bytes` (of one
    device: memory of the device alone; of the host), `argument_bytes` (what the compiler counts for
    the arguments on the device), `parts` (name -> bytes of the arguments, of a config), `gradients`
    (bytes of those the step forms at once, of a config), `compiled` (the compiler's figures, see
    `memory.of_compiled`), `collectives` (kind -> bytes a step a device), `loops_counted_once`
    (names), `compile_seconds` (of the compile that was cached, if so), `cached`, `notes` (sentences
    about what the figures leave open), `message` (the compiler's words about a program that does
    not fit, or None), and `error` and `kind`, which are None. Of a program that the compiler
    refused for its size, `compiled` is empty, and `argument_bytes` and `collectives` are None; so
    are `collectives` of a program that JAX cannot read.
  """
  name = job['target']
  try:
    return _answer(job) | {'error': None, 'kind': None}
  except ValueError as e:
    return failed(name, 'refused', str(e))
  except jax.errors.JaxRuntimeError as e:
    words = str(e)[:MESSAGE]
    reason = words.partition('\n')[0]
    return failed(name, 'compiler', f'{name}: the compiler refused the program: {reason}', words)
  except Exception as e:  # Whatever a model or a step raises, the other targets have their reports.
    words = traceback.format_exc()[-MESSAGE:]
    return failed(name, 'failed', f'{name}: {type(e).__name__}: {e}'.splitlines()[0], words)


def failed(target: str, kind: str, error: str, message: str | None = None) -> dict:
  """Returns the report of a job that compiled nothing: `fits` is None, `error` a sentence, `kind`
  one word, and `message` what the compiler said, or None.
  """
  return {'target': target, 'fits': None, 'error': error, 'kind': kind, 'message': message}


def _answer(job: dict) -> dict:
  target = targets.parse(job['target'])
  devices = targets.open_devices(target)
  if 'config' in job:
    step, arguments, intended, sizes = _of_config(job['config'], devices)
  else:
    step, arguments, intended = exported.load(job, devices)
    sizes = {'parts': {}, 'gradients': 0}
  lowered = step.lower(*arguments)
  options = _FAST if target.platform == 'gpu' else None
  entry = _entry(job.get('cache_dir'), target, devices[0], options, lowered.as_text())
  found = _read(entry)
  cached = found is not None
  if not cached:
    found = compile_lowered(lowered, devices[0].platform, options)[1]
    _write(entry, found)
  platform, host = devices[0].platform, memory.host_bytes(intended)
  answer = {
    'target': target.name,
    'platform': platform,
    'devices': target.devices,
    **verdict(found, target.limit_bytes, platform, host),
    **sizes,
    **found,
    'cached': cached,
  }
  return answer | {'notes': _notes(answer, is_here=target.platform == 'local')}


def _of_config(fields, devices):
  config = ConfigDict(fields)
  mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=devices)
  built = intended = build.build(config, mesh)
  if devices[0].platform == 'gpu':  # Cards that are not here do not tell one memory from another.
    intended = build.build(config, mesh.abstract_mesh)
  sizes = {
    'parts': memory.argument_parts(intended.state, intended.batch),
    'gradients': gradients(config, built.state),
  }
  return built.step, (built.state, built.batch), (intended.state, intended.batch), sizes


def gradients(config: ConfigDict, state) -> int:
  """Returns bytes per device of the gradients that a config's step forms at once."""
  if config.step == 'hybrid':
    exact = {k: state[k]['exact'] for k in ('params', 'opt')}
    return memory.gradient_bytes(exact | {'params': weights.trained(exact['params'])})
  if config.step in optimizers.ZEROTH_ORDER_STEPS:
    return 0
  layerwise = config.step != 'whole_tree'
  # Those of 8-bit weights are dense, and there are none of frozen ones.
  state = state | {'params': weights.dense(weights.trained(state['params']))}
  if config.accumulate_in == 'subspace':
    return memory.gradient_bytes(state) + memory.projected_bytes(state)
  return memory.gradient_bytes(state, accumulate=config.accumulate, layerwise=layerwise)


@contextlib.contextmanager
def _compiled_anew(platform: str):
  """Keeps JAX's persistent cache out of a compile for GPUs: of a program read back from there the
  temporaries are no longer known (JAX 0.11), and a step of 60 GiB would be said to fit.
  """
  if platform != 'gpu':
    yield
    return
  used = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # JAX asks for the option once.
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', used)
    compilation_cache.reset_cache()


def compile_lowered(lowered, platform: str, options=None) -> tuple:
  """Returns the program compiled for a platform, and what only the compiler knows of it, for
  `verdict`.

  A TPU's compiler refuses what does not fit; then the program is None.
  """
  started = time.monotonic()
  try:
    with _compiled_anew(platform):
      compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as e:
    if (sizes := read_out_of_memory(str(e))) is None:
      raise
    found = {'needs_bytes': sizes[0], 'limit_bytes': sizes[1], 'message': str(e)[:MESSAGE]}
    empty = {'compiled': {}, 'collectives': None, 'loops_counted_once': []}
    return None, found | empty | {'compile_seconds': time.monotonic() - started}
  seconds = time.monotonic() - started
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError:  # JAX reads fewer programs than a newer libtpu makes.
    text = None
  return compiled, {
    'compiled': memory.of_compiled(compiled),
    'collectives': None if text is None else collectives.count(text),
    'loops_counted_once': [] if text is None else collectives.unknown_loops(text),
    'compile_seconds': seconds,
    'message': None,
  }


def read_out_of_memory(message: str) -> tuple[int, int] | None:
  """Returns the bytes that a program needs and the bytes there are, from the words of a TPU's
  compiler; None when they are about something else.

  >>> read_out_of_memory('HLO temporaries (26.50G) exceeds available HBM (15.75G).')
  (28454158336, 16911433728)
  """
  for pattern in _HBM_OOM:
    if match := pattern.search(message):
      need, need_unit, limit, limit_unit = match.groups()
      return round(float(need) * _UNITS[need_unit]), round(float(limit) * _UNITS[limit_unit])
  return None


def verdict(found: dict, limit: int | None, platform: str, host: int) -> dict:
  """Returns `fits` and the sizes it follows from, see `report`.

  It goes by device memory alone, but on a CPU, whose memory is the host's.

  Args:
    found: What `compile_lowered` knows; the figures of a refusal are taken out of it.
    limit: Memory of one device, None when nobody says.
    platform: Of the device.
    host: Bytes of arguments in host memory.
  """
  limit = found.pop('limit_bytes', limit)
  answer = {'limit_bytes': limit, 'host_bytes': host, 'argument_bytes': None}
  if (needs := found.pop('needs_bytes', None)) is not None:
    return answer | {'fits': False, 'peak_bytes': needs}
  sizes = found['compiled']
  peak = memory.device_peak(sizes, platform, host)
  taken = peak + host if platform == 'cpu' else peak
  return answer | {
    'fits': None if limit is None else taken <= limit,
    'peak_bytes': peak,
    'host_bytes': host + memory.new_on_host(sizes),
    'argument_bytes': memory.counted_arguments(sizes, host),
  }


def _notes(answer, is_here: bool) -> list[str]:
  notes = []
  is_card = answer['platform'] == 'gpu' and not is_here
  share = answer['peak_bytes'] / (answer['limit_bytes'] or math.inf)
  if is_card and answer['fits'] and share > PREALLOCATED:
    notes.append(
      f'JAX takes {PREALLOCATED:.0%} of a card unless told otherwise, and this needs {share:.0%}; '
      f'set {FRACTIONS[0]}'
    )
  if is_card and answer['fits'] and share > _TIGHT:
    notes.append(
      'the limit is the whole memory of the card, of which CUDA keeps some hundred MiB; allocators '
      'were seen to take 1 to 4 % more than a receipt'
    )
  if is_card and answer['host_bytes']:
    notes.append(
      'the compiler counted the arguments in host memory as a card holds them, and they are taken '
      'off its peak; what streams them to the card is in it only where the program copies'
    )
  if answer['compiled'] and answer['collectives'] is None:
    notes.append(
      'collectives are unknown: this version of JAX cannot read the program that the compiler '
      'made; a newer one may'
    )
  if answer['loops_counted_once']:
    notes.append(
      'collectives of loops whose number of turns only the data says count once: '
      + ', '.join(answer['loops_counted_once'])
    )
  return notes


def _entry(cache_dir, target, device, options, text) -> pathlib.Path | None:
  """The file of a compile, named by a hash of all that it follows from."""
  if cache_dir is None:
    return None
  versions = []
  for package in _VERSIONED:
    try:
      versions.append(f'{package}=={importlib.metadata.version(package)}')
    except importlib.metadata.PackageNotFoundError:
      continue
  # An entry holds our own counts: what counts them is in the name too.
  counters = [pathlib.Path(file).read_text() for file in (__file__, memory.__file__)]
  counters.append(pathlib.Path(collectives.__file__).read_text())
  environment = [os.environ.get(name, '') for name in _OPTIONS]
  device = [device.device_kind, device.client.platform_version]
  facts = targets.facts_text(target)
  key = json.dumps([target.name, facts, device, options, environment, versions, counters, text])
  return pathlib.Path(cache_dir) / f'{hashlib.sha256(key.encode()).hexdigest()[:32]}.json'


def _read(entry) -> dict | None:
  """What an earlier compile found; None when there is none, or its file is damaged."""
  try:
    found = json.loads(entry.read_text()) if entry else None
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) and found.keys() >= _FOUND else None


def _write(entry, found) -> None:
  """Atomically: another process may read or write the same entry."""
  if entry is None:
    return
  draft = entry.with_suffix(f'.{os.getpid()}')
  with contextlib.suppress(OSError):  # A full disk costs the next plan a compile, not this answer.
    entry.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(json.dumps(found))
    draft.replace(entry)
