"""The largest batch that fits, by compiling."""

import math
from collections.abc import Callable

from ml_collections import ConfigDict

from memjax.plan import compiler
from memjax.plan import targets as targets_lib
from memjax.plan.receipt import receipt, verdict

MOST = 2**20  # Units; a search that passes them has no memory limit to find.


def largest_batch(config: ConfigDict, target: str, *, cache_dir=None, say=lambda *_: None):
  """Finds the largest `config.batch_size` whose step fits on a target.

  Tries batches that divide over the mesh's data axes and the config's micro-batches, and no others.

  Args:
    config: Of a run; its `batch_size` is not read.
    target: Name of a target whose memory is known.
    cache_dir: As in `memjax.plan.plan`.
    say: Called as `say(batch_size, sentence)` for each batch tried.

  Returns:
    The batch size and its receipt; (0, the receipt of the smallest batch) if not even that fits. A
    batch whose compile died counts as one that does not fit, and a note of the receipt names it.

  Raises:
    ValueError: as `memjax.plan.plan` of the smallest batch, and for a target whose memory limit is
      not known.
  """
  unit, first = batch_unit(config, targets_lib.parse(target).devices)
  size_of = lambda k: first + unit * (k - 1)
  seen, died = {}, {}

  def measure(counts):
    jobs = [compiler.config_job(with_batch(config, size_of(k)), target) for k in counts]
    for k, report in zip(counts, compiler.compile_jobs(jobs, cache_dir=cache_dir)):
      if report['error'] and k > 1:
        died[k] = report['error']
        say(size_of(k), report['error'])
        continue
      seen[k] = receipt(report)
      if seen[k]['fits'] is None:
        raise ValueError(f'{target}: its memory limit is not known, so no batch is the largest')
      say(size_of(k), verdict(seen[k]))
    return [k in seen and seen[k]['fits'] for k in counts]

  best = largest(measure)
  found = seen[best or 1]
  above = [size_of(k) for k in died if k > best]
  if best and above:
    note = f'batch {min(above):,} could not be compiled, so that a larger batch may fit'
    found = found | {'notes': [*found['notes'], note]}
  return size_of(best) if best else 0, found


def largest(measure: Callable[[list[int]], list[bool]]) -> int:
  """Returns the largest count that fits, 0 if 1 does not, asking about two at a time.

  Powers of two first; then the interval that is left is cut into three, again and again.

  Args:
    measure: Function of one or two counts that says which of them fit; all below one that fits do.

  Raises:
    ValueError: when a million fit.

  >>> largest(lambda counts: [k <= 11 for k in counts])
  11
  """
  low, high = 0, None  # Fits; does not.
  while high is None:
    if low >= MOST:
      raise ValueError(f'{low:,} still fit; the memory does not seem to depend on the batch')
    low, high = _narrow([max(1, 2 * low), max(2, 4 * low)], measure, low, high)
  while high - low > 1:
    third = max(1, (high - low) // 3)
    counts = sorted({low + third, min(low + 2 * third, high - 1)})
    low, high = _narrow(counts, measure, low, high)
  return low


def batch_unit(config: ConfigDict, devices: int) -> tuple[int, int]:
  """Returns what batches are multiples of, and the smallest batch.

  They divide over the data axes of a mesh of so many devices, in the config's micro-batches. A pool
  that rows are chosen from divides into its own parts too, and holds all that are kept.
  """
  fsdp, tensor, data = config.mesh.fsdp, config.mesh.tensor, config.mesh.data
  apart = max(tensor, 1) * max(config.mesh.sides, 1)
  ways = devices // apart if -1 in (fsdp, data) else data * fsdp
  unit = max(ways, 1) * config.accumulate
  if config.select.name == 'none':
    return unit, unit
  unit = math.lcm(unit, config.select.parts)
  return unit, unit * math.ceil(config.select.keep / unit)


def with_batch(config: ConfigDict, batch_size: int) -> ConfigDict:
  """Returns a copy of a config with another batch."""
  config = config.copy_and_resolve_references().unlock()
  config.batch_size = batch_size
  return config.lock()


def _narrow(counts, measure, low, high):
  for k, fits in zip(counts, measure(counts)):
    if fits:
      low = max(low, k)
    else:
      high = k if high is None else min(high, k)
  return low, high
