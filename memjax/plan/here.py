"""The step of a run, compiled for the very devices it will run on, and what to do if it does not
fit there.
"""

import math
import os
import time

import jax
from ml_collections import ConfigDict

from memjax import build, sharding
from memjax.plan import memory, program
from memjax.plan.receipt import amount, receipt

TRIES = 8  # Compiles in search of a way out.
WAYS = 3  # That are shown.
MOST = 0.95  # Of a card's memory for JAX: the rest is the driver's.


def compile_here(config: ConfigDict, parts: build.Parts):
  """Compiles a run's step; allocates nothing.

  Returns:
    The compiled step and its receipt. The step is None when the compiler refused it for want of
    memory.

  Raises:
    ValueError: when the step does not write its new state over the old one.
  """
  started = time.monotonic()
  mesh = jax.tree.leaves(parts.state)[0].sharding.mesh
  device = mesh.local_devices[0]  # Of another process it would tell nothing.
  limit = memory.limit_bytes(device)  # Before the compiler takes its own.
  step, found = program.compile_lowered(parts.step.lower(parts.state, parts.batch), device.platform)
  if step is not None:
    memory.check_donated(step, parts.state)
  host = memory.host_bytes(parts.state, parts.batch)
  report = {
    'target': device.device_kind,
    'platform': device.platform,
    'devices': mesh.size,
    **program.verdict(found, limit, device.platform, host),
    'parts': memory.argument_parts(parts.state, parts.batch),
    'gradients': program.gradients(config, parts.state),
    **found,
    'compile_seconds': time.monotonic() - started,  # Tracing included.
    'cached': False,
  }
  return step, receipt(report)


def check_fits(config: ConfigDict, found: dict, devices, say=lambda line: None) -> None:
  """Refuses a run whose step does not fit, with the cheapest ways out.

  Args:
    config: Of the run.
    found: Receipt of its step.
    devices: Devices of its mesh.
    say: Called with a line about what is tried.

  Raises:
    ValueError: with a line a way out: what to add to the command, and what the step then needs,
      compiled for the same devices. Or, when the memory of this host is too small for what the step
      keeps there, with what there is.
  """
  devices = list(devices)
  check_host(found, devices)
  if found['fits'] is not False:
    return
  peak, limit = found['peak_bytes'], found['limit_bytes']
  lines = [
    f'the training step needs {amount(peak)} on each device, of which there are {amount(limit)}; '
    'nothing was allocated'
  ]
  if devices[0].platform == 'gpu' and (setting := larger_fraction(peak, limit)) is not None:
    lines.append(f'  {setting} before the command  fits; more of the card for JAX')

  def measure(changes):
    say('trying ' + flags(changes))
    changed = config.copy_and_resolve_references().unlock()
    changed.update_from_flattened_dict(changes)
    mesh = sharding.make_mesh(**changed.mesh.to_dict(), devices=devices)
    return compile_here(changed, build.build(changed, mesh))[1]

  ways = ways_out(config, found, measure)
  for changes, after, cost in ways:
    word = 'fits' if after['fits'] else 'still does not fit'
    lines.append(f'  {flags(changes)}  needs {amount(after["peak_bytes"])}, {word}; {cost}')
  if len(lines) == 1:
    lines.append('  no change of one field was found that needs less; take more or larger devices')
  raise ValueError('\n'.join(lines))


def check_host(found: dict, devices: list[jax.Device]) -> None:
  """Refuses a run that keeps more in this host's memory than there is.

  Raises:
    ValueError: with both sizes and a way out.
  """
  if devices[0].platform == 'cpu':  # Whose limit is the host's.
    return
  here = sum(device.process_index == jax.process_index() for device in devices)
  need, available = found['host_bytes'] * here, memory.host_available()
  if available is not None and need > available:
    raise ValueError(
      f"the training step keeps {amount(need)} in this host's memory, of which {amount(available)} "
      'are available; nothing was allocated. Take a host with more memory, or keep less there: '
      'config.offload_state, config.param_dtype and config.weights say what and how'
    )


def larger_fraction(peak: int, limit: int) -> str | None:
  """Returns what to set for a step to fit a card that is not JAX's alone; None for a card that is
  too small.

  >>> larger_fraction(peak=20, limit=18)  # JAX took three quarters of 24.
  'XLA_CLIENT_MEM_FRACTION=0.87'
  """
  names = program.FRACTIONS
  name = next((name for name in names if os.environ.get(name)), names[0])
  # What a receipt leaves out was seen to be up to 4 % of it.
  share = math.ceil(104 * peak / limit * float(os.environ.get(name) or program.PREALLOCATED)) / 100
  return f'{name}={share:.2f}' if share <= MOST else None


def ways_out(config: ConfigDict, found: dict, measure) -> list[tuple[dict, dict, str]]:
  """Returns up to three changes of a config that need less memory, those that fit first.

  Tries changes one by one, from those that cost the least to training, until three fit; then all
  of them together that leave the results as they are.

  Args:
    config: Of the run.
    found: Its receipt.
    measure: Function of changes (field -> value) that returns the receipt of the changed config, or
      raises a ValueError when it cannot be.
  """
  tried = []
  singles = changes_of(config, found['devices'])
  exact = {k: v for changes, _, same in singles if same for k, v in changes.items()}
  together = [(exact, 'the same results, slower', True)] if len(exact) > 1 else []
  for changes, cost, _ in singles[: TRIES - len(together)] + together:
    try:
      after = measure(changes)
    except ValueError:
      continue  # Not for this method or mesh.
    if after['peak_bytes'] < found['peak_bytes']:
      tried.append((changes, after, cost))
    if sum(bool(after['fits']) for _, after, _ in tried) == WAYS:
      break
  by_need = lambda way: (not way[1]['fits'], 0 if way[1]['fits'] else way[1]['peak_bytes'])
  return sorted(tried, key=by_need)[:WAYS]


def changes_of(config: ConfigDict, devices: int) -> list[tuple[dict, str, bool]]:
  """Returns (changes, what they cost, whether results stay the same up to rounding), the cheapest
  first; `devices` is how many the mesh has.
  """
  ways = []
  layerwise = config.step != 'whole_tree'
  if config.remat != 'full' and not layerwise:
    ways.append(({'remat': 'full'}, 'every block runs twice', True))
  mesh = config.mesh
  most = config.batch_size // (devices // (max(mesh.tensor, 1) * max(mesh.sides, 1)))
  if config.accumulate < most and not config.batch_size % most:
    ways.append(({'accumulate': most}, 'more and smaller micro-batches', True))
  if config.mesh.data != 1:
    ways.append(({'mesh.data': 1, 'mesh.fsdp': -1}, 'weights are gathered a layer at a time', True))
  if not layerwise:
    changes = {'step': 'layerwise', 'remat': 'full'}
    ways.append((changes, 'every block runs twice, each layer is updated at once', True))
  elif config.offload_state < 1:
    changes = {'offload_state': 1.0}
    ways.append((changes, 'the state of every layer travels to the device and back', True))
  if config.param_dtype == 'float32':
    changes = {'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16'}
    ways.append((changes, 'weights of 16 bits, rounded stochastically', False))
  if config.step == 'layerwise' and config.weights == 'dense':
    ways.append(({'weights': 'int8'}, 'weights of 8 bits, rounded stochastically', False))
  if layerwise and config.accumulate < most:  # Micro-batches leave every layer's input where it is.
    changes = {'batch_size': config.batch_size // most, 'accumulate': 1}
    ways.append((changes, 'noisier updates, of fewer sequences', False))
  for name in ('galore', 'adafactor'):
    if config.optimizer.name != name:
      changes = {'optimizer.name': name}
      ways.append((changes, 'another method, which wants its own learning rate', False))
  return ways


def flags(changes: dict) -> str:
  """Returns what to add to the command.

  >>> flags({'remat': 'full', 'accumulate': 2})
  '--config.remat=full --config.accumulate=2'
  """
  return ' '.join(f'--config.{name}={value}' for name, value in changes.items())
