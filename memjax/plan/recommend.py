"""Which methods, rematerialisation policies and precisions fit a target, and what they cost."""

import math
from collections.abc import Callable

import jax
from ml_collections import ConfigDict
from rich.table import Table

from memjax import build, optimizers
from memjax import config as config_lib
from memjax.build_model import bare_model
from memjax.models.remat import POLICIES
from memjax.plan import compiler, work
from memjax.plan.receipt import receipt, state_bytes, unit_of

COMPILES = 32  # At most, unless told otherwise: some ten minutes of a 7B model on two cores.

# Name -> fields of a config: what a step recomputes, or that it goes layer by layer.
BACKWARD = {name: {'step': 'whole_tree', 'remat': name} for name in POLICIES} | {
  'layerwise': {'step': 'layerwise', 'remat': 'full'}
}
# Name -> dtypes of the parameters and of the products.
PRECISIONS = {
  'float32': {'param_dtype': 'float32', 'compute_dtype': 'float32'},
  'mixed': {'param_dtype': 'float32', 'compute_dtype': 'bfloat16'},
  'bfloat16': {'param_dtype': 'bfloat16', 'compute_dtype': 'bfloat16'},
}
REFERENCE = ('adamw', 'none')  # Whose operations are 1, in the config's own precision.


def recommend(
  config: ConfigDict,
  target: str,
  *,
  compiles: int = COMPILES,
  cache_dir=None,
  on_done: Callable | None = None,
) -> tuple[list[dict], int]:
  """Compiles a model's step in many ways for one target.

  Each method first in the config's own way, then in the others, as far as `compiles` goes.

  Args:
    config: Of a run; its model, batch and mesh are kept.
    target: Name of a target.
    compiles: Combinations to compile, at most.
    cache_dir: As in `memjax.plan.plan`.
    on_done: Called as `on_done(index, report)` when one is compiled.

  Returns:
    Rows `{method, backward, precision, fits, peak_bytes, state_bytes, relative_work, receipt}`:
    those that fit first, then by peak, state and work. And how many combinations there are.

  Raises:
    ValueError: as `memjax.plan.plan`, when no combination can be compiled.
  """
  combinations = variants(config)
  chosen = combinations[:compiles]
  jobs = [compiler.config_job(variant, target) for *_, variant in chosen]
  reports = compiler.compile_jobs(jobs, cache_dir=cache_dir, on_done=on_done)
  sound = [(c, report) for c, report in zip(chosen, reports) if not report['error']]
  if not sound:
    raise ValueError(reports[0]['error'])
  reference = with_fields(config, BACKWARD[REFERENCE[1]])
  unit = work.step_flops(with_method(reference, REFERENCE[0]))
  rows = []
  for (method, backward, precision, variant), report in sound:
    found = receipt(report)
    rows.append(
      {
        'method': method,
        'backward': backward,
        'precision': precision,
        'fits': found['fits'],
        'peak_bytes': found['peak_bytes'],
        'state_bytes': state_bytes(found),
        'relative_work': work.step_flops(variant) / unit,
        'receipt': found,
      }
    )
  return sorted(rows, key=_order), len(combinations)


def variants(config: ConfigDict) -> list[tuple[str, str, str, ConfigDict]]:
  """Returns (method, backward, precision, config) of every combination, in the order of interest.

  The config's own way first, then the frugal ones; within a way the config's own method, AdamW,
  then from the least state to the most.
  """
  ways = [
    (backward, precision, with_fields(config, BACKWARD[backward] | PRECISIONS[precision]))
    for precision in reversed(PRECISIONS)
    for backward in reversed(BACKWARD)
  ]
  ways.sort(key=lambda way: _way_of(config) != way[:2])
  found = []
  methods = _methods(config)
  for backward, precision, variant in ways:
    for method in methods:
      found.append((method, backward, precision, with_method(variant, method)))
  return found


def with_fields(config: ConfigDict, fields: dict) -> ConfigDict:
  """Returns a copy of a config with fields such as `{'mesh.fsdp': 8}` set."""
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(fields)
  return config.lock()


def with_method(config: ConfigDict, name: str) -> ConfigDict:
  """Returns a copy of a config with another optimizer; what depends on the run is filled in.

  Raises:
    ValueError: for a method that needs an argument which neither has a default nor follows from the
      run.
  """
  if config.optimizer.name == name:
    return config
  model = bare_model(config)
  known = optimizers.arguments(name)
  fitting = {  # As published: a quarter of the width, four fifths of the run.
    'rank': max(1, model.hidden // 4),
    'head_dim': model.head_dim,
    'random_after': max(1, config.steps * 4 // 5),
  }
  arguments = {k: v for k, v in fitting.items() if k in known}
  changed = config.copy_and_resolve_references().unlock()
  changed.optimizer = config_lib.optimizer(
    name, learning_rate=config.optimizer.learning_rate, **arguments
  )
  return changed.lock()


def table(rows: list[dict], title: str) -> Table:
  """Returns the rows of `recommend` as a table to print, in GiB or, if all is less, in MiB."""
  unit, word = unit_of(row['peak_bytes'] for row in rows)
  out = Table(title=title, title_justify='left')
  out.add_column('method')
  out.add_column('backward')
  out.add_column('precision')
  for column in ('fits', f'peak {word}', f'state {word}', 'work'):
    out.add_column(column, justify='right')
  fits = {True: '[green]yes[/]', False: '[red]no[/]', None: 'unknown'}
  for row in rows:
    out.add_row(
      *(row[k] for k in ('method', 'backward', 'precision')),
      fits[row['fits']],
      *(f'{row[k] / unit:,.2f}' for k in ('peak_bytes', 'state_bytes')),
      f'{row["relative_work"]:.2f}',
    )
  return out


def _methods(config) -> list[str]:
  """Methods that can be built for the model, the config's own and AdamW first."""
  sizes = {}
  for name in optimizers.OPTIMIZERS:
    try:
      sizes[name] = _state_numbers(with_method(config, name))
    except ValueError:
      continue  # It needs what the model does not tell, or has no matrix to work on.
  first = (config.optimizer.name, REFERENCE[0])
  return sorted(sizes, key=lambda name: (name != first[0], name != first[1], sizes[name]))


def _state_numbers(config) -> int:
  params = bare_model(config).abstract()
  state = jax.eval_shape(build.build_transform(config, 0.0).init, params)
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


def _way_of(config) -> tuple[str, str]:
  """The names of a config's own way, ('', '') if it has none."""
  pick = lambda names: next(
    (k for k, fields in names.items() if all(config[f] == v for f, v in fields.items())), ''
  )
  return pick(BACKWARD), pick(PRECISIONS)


def _order(row):
  fits = {True: 0, None: 1, False: 2}[row['fits']]
  return fits, row['peak_bytes'], row['state_bytes'], row['relative_work']
