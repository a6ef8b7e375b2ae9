"""Trains several configs on the same tokens and compares them: one table, one picture.

    python experiments/compare.py
    python experiments/compare.py --methods=all
    python experiments/compare.py --configs='configs/quickstart.py:method=adamw
    configs/quickstart.py:method=galore'

Without `--configs`: methods of the quick start, 1,000 steps each; AdamW, Adafactor, and GaLore with
either basis, if no others are named. A finished run is not repeated; a killed one resumes. Leaves
`compare.json` and `compare.png` in `--workdir`, and each run's own files below it.
"""

import json
import pathlib
import runpy
import statistics

from absl import app, flags, logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from memjax import command, metrics
from memjax import config as config_lib
from memjax.train import train

METHODS = flags.DEFINE_list(
  'methods', 'adamw,adafactor,galore,galore_svd', 'Methods of configs/quickstart.py, or all.'
)
CONFIGS = flags.DEFINE_spaceseplist(
  'configs', [], 'In their place: config files with arguments, separated by spaces.'
)
WORKDIR = flags.DEFINE_string('workdir', 'runs/compare', 'Where the runs and the results go.')
MIB = 2**20


def main():
  logging.set_verbosity(logging.WARNING)  # Checkpointing tells every step it takes at INFO.
  directory = pathlib.Path(WORKDIR.value)
  configs = read(CONFIGS.value or quickstart_specs(METHODS.value))
  check_alike(configs)
  for name, config in configs.items():
    train(config, directory / name)
  labels = shorten(list(configs))
  rows = [result(directory / name, label) for name, label in zip(configs, labels)]
  (directory / 'compare.json').write_text(json.dumps(rows, indent=2) + '\n')
  Console().print(table(rows))
  draw(rows, directory)


def quickstart_specs(methods: list[str]) -> list[str]:
  """Returns configs of the quick start with these methods; `['all']` has every one."""
  if methods == ['all']:
    quickstart = pathlib.Path(__file__).parents[1] / 'configs' / 'quickstart.py'
    methods = runpy.run_path(quickstart)['METHODS']
  return [f'configs/quickstart.py:method={name},steps=1000,seq_len=64' for name in methods]


def read(specs: list[str]) -> dict:
  """Returns configs by the names of their runs.

  Raises:
    ValueError: for a config that cannot be loaded, or two whose runs have the same name.
  """
  configs = {}
  for spec in specs:
    name = config_lib.run_name(spec)
    if name in configs:
      raise ValueError(f'two configs would both run as {name!r}, one of them {spec}; drop one')
    configs[name] = config_lib.load(spec)
  return configs


def check_alike(configs: dict) -> None:
  """Refuses to compare runs of different models, or that do not read the same text equally long.

  Raises:
    ValueError: naming what differs.
  """
  same = ('model', 'model_args', 'load', 'task', 'data', 'eval_tokens')
  same += ('steps', 'batch_size', 'seq_len', 'seed')
  (first, config), *others = configs.items()
  for name, other in others:
    different = [f for f in same if other[f] != config[f]]
    if different:
      raise ValueError(f'{first} and {name} differ in {", ".join(different)}; give them the same')


def shorten(names: list[str]) -> list[str]:
  """Returns names without what they all begin and end with.

  >>> shorten(['quickstart-methodadamw-steps9', 'quickstart-methodgalore-steps9'])
  ['adamw', 'galore']
  """
  if len(names) < 2:
    return names
  start = _common(names)
  end = _common([name[start:][::-1] for name in names])
  return [name[start : len(name) - end] or name for name in names]


def _common(names):
  """How many characters all names begin with."""
  columns = enumerate(zip(*names))
  return next((i for i, column in columns if len(set(column)) > 1), min(map(len, names)))


def result(directory: pathlib.Path, label: str) -> dict:
  """Reads what one run left."""
  lines = metrics.read(directory)
  receipt = json.loads((directory / 'memory.json').read_text())
  parts = receipt['parts']
  evaluations = [line for line in lines if 'eval/loss' in line]
  seconds = [line['throughput/step_seconds'] for line in lines if 'throughput/step_seconds' in line]
  return {
    'name': label,
    'eval/loss': evaluations[-1]['eval/loss'],
    'eval/perplexity': evaluations[-1]['eval/perplexity'],
    'state_bytes': parts['basis'] + parts['moments'] + parts['other_state'],
    'parameter_bytes': parts['parameters'],
    'peak_bytes': receipt['peak_bytes'],
    # The fastest tenth of the logged intervals: other work on the machine slows the rest.
    'step_seconds': statistics.quantiles(seconds, n=10)[0],
    'curve': [(line['step'], line['eval/loss']) for line in evaluations],
  }


def table(rows: list[dict]) -> Table:
  """Returns the comparison; perplexity and step time are also given relative to the first row."""
  out = Table(title='Same model, same tokens')
  columns = ('run', 'eval loss', 'perplexity', 'rel.', 'state MiB', 'peak MiB', 'step s', 'rel.')
  for column in columns:
    out.add_column(column, justify='left' if column == 'run' else 'right')
  for row in rows:
    out.add_row(
      row['name'],
      f'{row["eval/loss"]:.4f}',
      f'{row["eval/perplexity"]:.2f}',
      f'{row["eval/perplexity"] / rows[0]["eval/perplexity"]:.3f}',
      f'{row["state_bytes"] / MIB:.2f}',
      f'{row["peak_bytes"] / MIB:.0f}',
      f'{row["step_seconds"]:.3f}',
      f'{row["step_seconds"] / rows[0]["step_seconds"]:.3f}',
    )
  return out


def draw(rows: list[dict], directory: pathlib.Path) -> None:
  """Draws validation loss over steps, and its last value over the bytes of optimizer state."""
  figure = Figure(figsize=(12, 5.5), layout='constrained')
  FigureCanvasAgg(figure)
  curves, points = figure.subplots(1, 2)
  for i, row in enumerate(rows):
    style = ('-', '--', ':')[i // 10 % 3]  # Colours come round after ten.
    (line,) = curves.plot(*zip(*row['curve'], strict=True), style, marker='.', label=row['name'])
    size = row['state_bytes'] / MIB
    points.scatter(size, row['eval/loss'], color=line.get_color(), s=30)
    points.annotate(
      row['name'], (size, row['eval/loss']), (4, 2), textcoords='offset points', fontsize='x-small'
    )
  curves.set(xlabel='step', ylabel='validation loss (nats a token)')
  points.set(xlabel='optimizer state (MiB)', ylabel='last validation loss', xlim=(0, None))
  for axes in (curves, points):
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
  curves.legend(frameon=False, fontsize='x-small', ncols=1 + len(rows) // 10)
  figure.savefig(directory / 'compare.png', dpi=150)


if __name__ == '__main__':
  traceback = flags.DEFINE_bool('traceback', False, 'Show where a refused input was found.')
  app.run(lambda argv: command.run('compare.py', main, traceback.value))
