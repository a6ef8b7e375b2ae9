"""Fine-tunes a pretrained decoder on a task by prompt, with and without gradients: one table, one
picture.

    python experiments/finetune_decoder.py --model=FOLDER --task=sst2 --train=train.jsonl \
        --test=test.jsonl --steps=200 --seeds=3
    python experiments/finetune_decoder.py ... --methods=mezo,lozo --rates=1e-6,1e-5

FOLDER is one of Hugging Face, or a GGUF file; `--task` a key of `memjax.tasks.TASKS`. Compares the
untrained model, LoRA, AdamW layer by layer, and methods without gradients: accuracy over updates,
time and peak memory of the compiled step. Methods without gradients get `--times` as many updates,
as they need more and each is cheaper. The second form searches learning rates. A finished run is
not repeated; a killed one resumes. Leaves `results.json`, `results.md` and `results.png` in
`--workdir`, and each run's own files below it.
"""

import json
import pathlib
import statistics
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import memjax
from memjax import config as config_lib
from memjax import metrics
from memjax.naming import nearest
from memjax.train import train

MODEL = flags.DEFINE_string('model', None, 'Folder of a decoder, or a GGUF file.', required=True)
TASK = flags.DEFINE_string('task', 'sst2', 'A key of memjax.tasks.TASKS.')
TRAIN = flags.DEFINE_string('train', None, 'File to train on.', required=True)
TEST = flags.DEFINE_string('test', None, 'File to evaluate on.', required=True)
WORKDIR = flags.DEFINE_string('workdir', 'runs/finetune_decoder', 'Where results go.')
METHODS = flags.DEFINE_list('methods', [], 'Which to run; all if none is named.')
RATES = flags.DEFINE_list('rates', [], "Learning rates to try instead of each method's own.")
SEEDS = flags.DEFINE_integer('seeds', 1, 'Runs a method; of the order of rows and the noise.')
STEPS = flags.DEFINE_integer('steps', 200, 'Updates of the methods with gradients.')
TIMES = flags.DEFINE_integer('times', 4, 'Those of the others, over these.')
BATCH = flags.DEFINE_integer('batch', 16, 'Rows an update.')
LENGTH = flags.DEFINE_integer('seq_len', 96, 'Tokens a row.')
EXAMPLES = flags.DEFINE_integer('examples', 1000, 'Rows to train on.')
TESTED = flags.DEFINE_integer('tested', 400, 'Rows to evaluate on.')
EVALUATIONS = flags.DEFINE_integer(
  'evaluations', 4, 'A run, beside the one of the untrained model.'
)

GIB = 2**30
EPS = 1e-3  # Of differences of values.


class Method(NamedTuple):
  """A way to fine-tune."""

  label: str
  optimizer: str
  rate: float
  arguments: dict  # Of the optimizer.
  changes: dict  # Of the config; 'zeroth_order' as `step` takes values of the loss alone.


_VALUES = dict(step='zeroth_order')
METHODS_BY_NAME = {
  'lora': Method(
    'LoRA, rank 8',
    'adamw',
    2e-3,
    {},
    dict(adapter=config_lib.adapter('lora', rank=8, alpha=16.0)),
  ),
  'adamw': Method('AdamW, layer by layer', 'adamw', 2e-5, {}, dict(step='layerwise', remat='full')),
  'mezo': Method('MeZO', 'mezo', 2e-5, dict(eps=EPS), _VALUES),
  'lozo': Method('LOZO, rank 2', 'lozo', 2e-5, dict(eps=EPS, rank=2), _VALUES),
  'subzero': Method('SubZero, rank 24', 'subzero', 1e-5, dict(eps=EPS, rank=24), _VALUES),
  'zo_adam': Method('ZO-Adam', 'zo_adam', 1e-4, dict(eps=EPS), _VALUES),
}


def main(_):
  logging.set_verbosity(logging.WARNING)  # Checkpointing tells every step it takes at INFO.
  directory = pathlib.Path(WORKDIR.value)
  untrained = measure_untrained(directory)
  groups = {}
  for seed in range(SEEDS.value):
    for name, method in chosen_methods().items():
      found = run(method, seed, directory / f'{name}-{seed}', untrained)
      groups.setdefault(name, []).append(found)
      (directory / 'results.json').write_text(json.dumps(groups, indent=2) + '\n')
      (directory / 'results.md').write_text(table(groups, untrained))
      draw(groups, directory)
  print((directory / 'results.md').read_text())


def chosen_methods() -> dict[str, Method]:
  """Returns the methods to run, each at its own learning rate or at each of `--rates`."""
  for name in METHODS.value:
    if name not in METHODS_BY_NAME:
      raise SystemExit(f'no method is called {name!r}; {nearest(name, METHODS_BY_NAME)}')
  methods = {name: METHODS_BY_NAME[name] for name in METHODS.value or METHODS_BY_NAME}
  if not RATES.value:
    return methods
  return {
    f'{name}-{rate}': method._replace(rate=float(rate), label=f'{method.label}, {rate}')
    for name, method in methods.items()
    for rate in RATES.value
  }


def config_of(method: Method, seed: int):
  """Returns the config of one run."""
  c = config_lib.default()
  c.load, c.seed = MODEL.value, seed
  c.task.name, c.task.train, c.task.test = TASK.value, TRAIN.value, TEST.value
  c.task.examples, c.task.test_examples = EXAMPLES.value, TESTED.value
  c.batch_size, c.seq_len = BATCH.value, LENGTH.value
  c.optimizer = config_lib.optimizer(
    method.optimizer, learning_rate=method.rate, **method.arguments
  )
  for field, value in method.changes.items():
    c[field] = value
  by_values = c.step == 'zeroth_order'
  c.steps = STEPS.value * (TIMES.value if by_values else 1)
  c.schedule.name = 'constant' if by_values else 'linear'
  c.schedule.warmup_ratio, c.schedule.final_ratio = 0.0 if by_values else 0.1, 0.0
  c.log_every = max(1, c.steps // 40)
  c.eval_every = c.checkpoint.every = max(1, c.steps // EVALUATIONS.value)
  c.checkpoint.keep = 1
  c.sample.tokens = 0
  return c


def measure_untrained(directory: pathlib.Path) -> float:
  """Returns the accuracy of the pretrained model, measured once."""
  report = directory / 'untrained' / 'evaluation.json'
  if not report.is_file():
    config = config_of(METHODS_BY_NAME['adamw'], seed=0)
    memjax.evaluate(MODEL.value, config=config, directory=report.parent)
  return json.loads(report.read_text())['tasks'][TASK.value]['accuracy']


def run(method: Method, seed: int, directory: pathlib.Path, untrained: float) -> dict:
  """Trains, unless a run of as many updates has finished, and returns what it left."""
  config, left = config_of(method, seed), directory / 'result.json'
  found = json.loads(left.read_text()) if left.is_file() else None
  if found is None or found['accuracy'][-1][0] != config.steps:
    train(config, directory)
    left.write_text(json.dumps(result(directory, method, untrained), indent=2) + '\n')
  return json.loads(left.read_text())


def result(directory: pathlib.Path, method: Method, untrained: float) -> dict:
  """Returns what a finished run left."""
  lines = metrics.read(directory)
  scores = [(line['step'], line['eval/accuracy']) for line in lines if 'eval/accuracy' in line]
  losses = [(line['step'], line['eval/loss']) for line in lines if 'eval/loss' in line]
  receipt = json.loads((directory / 'memory.json').read_text())
  seconds = [line['throughput/step_seconds'] for line in lines if 'throughput/step_seconds' in line]
  return {
    'label': method.label,
    'rate': method.rate,
    'accuracy': [(0, untrained), *scores],
    'loss': losses,
    'peak_gib': receipt['peak_bytes'] / GIB,
    'step_seconds': statistics.median(seconds) if seconds else None,
  }


def table(groups: dict[str, list[dict]], untrained: float) -> str:
  """Returns the results in Markdown."""
  lines = [
    '| method | learning rate | updates | accuracy | spread | seeds | peak | s/update |',
    '|---|---|---|---|---|---|---|---|',
    f'| untrained | | 0 | {untrained:.3f} | | | | |',
  ]
  for runs in groups.values():
    first, scores = runs[0], [run['accuracy'][-1][1] for run in runs]
    spread = f'{statistics.stdev(scores):.3f}' if len(runs) > 1 else ''
    seconds = [run['step_seconds'] for run in runs if run['step_seconds'] is not None]
    lines.append(
      f'| {first["label"]} | {first["rate"]:g} | {first["accuracy"][-1][0]} '
      f'| {statistics.mean(scores):.3f} | {spread} | {len(runs)} | {first["peak_gib"]:.2f} GiB '
      f'| {min(seconds, default=float("nan")):.3f} |'
    )
  return '\n'.join(lines) + '\n'


def draw(groups: dict[str, list[dict]], directory: pathlib.Path) -> None:
  """Draws accuracy over updates, on average over the seeds, and its spread."""
  figure = Figure(figsize=(6, 4), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for runs in groups.values():
    steps, scores = np.array([run['accuracy'] for run in runs]).transpose(2, 0, 1)
    axes.errorbar(
      steps[0], scores.mean(0), scores.std(0), marker='o', capsize=3, label=runs[0]['label']
    )
  axes.set(xlabel='updates', ylabel='accuracy', xscale='symlog')
  axes.grid(alpha=0.3)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize='small')
  figure.savefig(directory / 'results.png', dpi=150)


if __name__ == '__main__':
  app.run(main)
