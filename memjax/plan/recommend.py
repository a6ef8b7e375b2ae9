"""Which methods, rematerialisation policies and precisions fit a target, and what they cost."""

import itertools
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

# Name -> fields of a config: what a step recomputes, or that it goes layer by layer. And what only
# the other of these two steps can do.
BACKWARD = {
  name: {'step': 'whole_tree', 'remat': name, 'offload_state': 0.0} for name in POLICIES
} | {'layerwise': {'step': 'layerwise', 'remat': 'full', 'accumulate_in': 'weights'}}
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
) -> tuple[list[dict], dict[str, list[str]], int]:
  """Compiles a model's step in many ways for one target, as far as `compiles` goes.

  Args:
    config: Of a run; its model, batch and mesh are kept.
    target: Name of a target.
    compiles: Combinations to compile, at most.
    cache_dir: As in `memjax.plan.plan`.
    on_done: Called as `on_done(index, report)` when one is compiled.

  Returns:
    Rows `{method, backward, precision, fits, peak_bytes, state_bytes, relative_work, receipt}`:
    those that fit first, then by peak, state and work. Sentence -> combinations that it is the
    reason not to have a row for. And how many combinations there are.

  Raises:
    ValueError: as `memjax.plan.plan`, when no combination can be compiled.
  """
  config_lib.validate(config)
  combinations = variants(config)
  chosen = combinations[:compiles]
  unit = work.step_flops(with_method(with_backward(config, REFERENCE[1]), REFERENCE[0]))
  jobs = [compiler.config_job(variant, target) for *_, variant in chosen]
  reports = compiler.compile_jobs(jobs, cache_dir=cache_dir, on_done=on_done)
  rows, failed = [], {}
  for (method, backward, precision, variant), report in zip(chosen, reports):
    if report['error']:
      failed.setdefault(report['error'], []).append(f'{method} {backward} {precision}')
      continue
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
  if not rows:
    raise ValueError(reports[0]['error'])
  return sorted(rows, key=_order), failed, len(combinations)


def variants(config: ConfigDict) -> list[tuple[str, str, str, ConfigDict]]:
  """Returns (method, backward, precision, config) of every combination, in the order of interest.

  The config itself comes first, whatever its step, and then what is nearest to it, so that the
  first few vary all three. The next method is one step away, the next backward pass two and the
  next precision four: there are fewer of them. Each order begins with the config's own; then come
  AdamW and the methods from the least state to the most, and of the others the most frugal.
  """
  own = (config.optimizer.name, *_way_of(config))
  first = lambda names, name: sorted(names, key=lambda other: other != name)
  methods = _methods(config)
  backwards = first(reversed(BACKWARD), own[1])
  precisions = first(reversed(PRECISIONS), own[2])
  distance = lambda place: place[0] + 2 * place[1] + 4 * place[2]
  places = itertools.product(*(range(len(x)) for x in (methods, backwards, precisions)))
  found = [(*own, config)]
  for i, j, k in sorted(places, key=distance):
    method, backward, precision = methods[i], backwards[j], precisions[k]
    if (method, backward, precision) != own:
      variant = with_fields(with_backward(config, backward), PRECISIONS[precision])
      found.append((method, backward, precision, with_method(variant, method)))
  return found


def with_backward(config: ConfigDict, name: str) -> ConfigDict:
  """Returns a copy of a config with another backward pass, in which no groups take turns."""
  no_turns = {f'groups.{k}': v for k, v in config_lib.default().groups.items()}
  return with_fields(config, BACKWARD[name] | no_turns)


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
  changed.accumulate_in = 'weights'  # Not every method has a subspace to add up in.
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
  """The names of a config's own way, or what its fields say where it has none."""
  dtypes = {field: config[field] for field in ('param_dtype', 'compute_dtype')}
  named = [name for name, fields in PRECISIONS.items() if fields == dtypes]
  backward = config.remat if config.step == 'whole_tree' else config.step
  return backward, named[0] if named else '/'.join(dtypes.values())


def _order(row):
  fits = {True: 0, None: 1, False: 2}[row['fits']]
  return fits, row['peak_bytes'], row['state_bytes'], row['relative_work']
