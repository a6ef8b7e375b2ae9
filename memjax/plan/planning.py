"""Receipts of configs and of steps of one's own."""

import pathlib
import tempfile
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from memjax import config as config_lib
from memjax.plan import compiler, exported, memory
from memjax.plan import targets as targets_lib
from memjax.plan.receipt import receipt


def plan(
  config: ConfigDict,
  targets: Sequence[str],
  *,
  workers: int = compiler.WORKERS,
  cache_dir=None,
  on_done: Callable | None = None,
) -> list[dict]:
  """Returns what a config's training step needs on each target.

  Compiles it for each, in child processes, or reads an earlier compile from the disk.

  Args:
    config: Of a run, see `memjax.config.default`.
    targets: Names such as 'v5e:2x2', 'h100-80g*8' or 'local'; see `memjax.plan.targets.known`.
    workers: Compiles at a time.
    cache_dir: Directory of finished compiles; None is the user's cache folder, '' keeps none.
    on_done: Called with the index of a target and its report when it is done.

  Returns:
    A receipt a target, see `memjax.plan.receipt`.

  Raises:
    ValueError: in one sentence a target, for a config that cannot work, an unknown target, a
      compiler that is not installed, or a mesh or model that does not divide over the devices.
  """
  found, errors = try_plan(config, targets, workers=workers, cache_dir=cache_dir, on_done=on_done)
  if errors:
    raise ValueError('\n'.join(errors))
  return found


def try_plan(config: ConfigDict, targets: Sequence[str], **options) -> tuple[list, list[str]]:
  """Does as `plan`, and returns the receipts that there are and a sentence for each target that has
  none.
  """
  config_lib.validate(config)
  jobs = [compiler.config_job(config, name) for name in targets]
  reports = compiler.compile_jobs(jobs, **options)
  # Two targets may fail alike.
  errors = list(dict.fromkeys(report['error'] for report in reports if report['error']))
  return [receipt(report) for report in reports if not report['error']], errors


def plan_step(step, abstract_state, abstract_batch, target: str, *, cache_dir=None) -> dict:
  """Returns the receipt of any jitted step `step(state, batch)` on one target.

  Args:
    step: A jitted function; what its `donate_argnums` covers counts once.
    abstract_state: Its first argument as shapes. Leaves under a key or field `params` count as
      parameters; optimizer state is told apart by the names of its fields, see
      `memjax.plan.memory.STATE_PARTS`.
    abstract_batch: Its second argument as shapes.
    target: A name. For more than one device, shapes carry `NamedSharding`s over a mesh of as many;
      the mesh may be a `jax.sharding.AbstractMesh`.
    cache_dir: As in `plan`.

  Raises:
    ValueError: as `plan`, and for a step that is not jitted.
  """
  where = targets_lib.parse(target)
  parts = memory.argument_parts(abstract_state, abstract_batch)
  gradients = memory.gradient_bytes(abstract_state)
  with tempfile.TemporaryDirectory() as directory:
    file = pathlib.Path(directory) / 'step'
    job = exported.export_job(step, (abstract_state, abstract_batch), where, file)
    (report,) = compiler.compile_jobs([job], cache_dir=cache_dir)
  return receipt(report | {'parts': parts, 'gradients': gradients})
