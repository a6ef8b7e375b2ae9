"""Compares ways to choose half of a batch on a mixture of reasoning tasks of unequal size.

    pip install reasoning-gym==0.1.25
    python experiments/colm.py --steps=200
    python experiments/colm.py --model=FOLDER --rank=16 --steps=300

Trains through LoRA on CoLM's 32 of every 64 sequences, on random 32, on all 64, and on those that
the official single direction chooses, with equal pools and steps. `--model` is a preset, or what
`memjax.models.load` reads. Rows are written once; a finished run is not repeated, a killed one
resumes. Leaves `results.json`, `results.md` and `results.png` in `--workdir`: the loss of a token
and the share of exact answers, by source.
"""

import dataclasses
import json
import pathlib

import jax
from absl import app, flags, logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memjax import build as build_lib
from memjax import config as config_lib
from memjax import metrics, models, sharding
from memjax.evaluate import evaluate
from memjax.tasks import evaluation
from memjax.tasks.metrics import METRICS
from memjax.train import load_data, train

MODEL = flags.DEFINE_string('model', 'llama_tiny', 'A preset, or pretrained weights.')
TOKENIZER = flags.DEFINE_string('tokenizer', '', "The weights' own, or of a preset 'bytes'.")
RANK = flags.DEFINE_integer('rank', 16, 'Of the adapters.')
RATE = flags.DEFINE_float('learning_rate', 2e-4, 'Peak; 3 % warm-up, then linear.')
STEPS = flags.DEFINE_integer('steps', 200, 'Updates a run.')
POOL = flags.DEFINE_integer('pool', 64, 'Sequences of a pool; half of them are chosen.')
LENGTH = flags.DEFINE_integer('seq_len', 128, 'Tokens a sequence.')
ANSWER = flags.DEFINE_integer('new_tokens', 12, 'Tokens of an answer, at most.')
ROWS = flags.DEFINE_integer('rows', 8000, 'Rows to train on, all sources together.')
HELD_OUT = flags.DEFINE_integer('held_out', 32, 'Rows of each source to measure on.')
RUNS = flags.DEFINE_list('runs', [], 'Which to run; all if none is named.')
SEED = flags.DEFINE_integer('seed', 0, 'Of parameters, order and choices.')
WORKDIR = flags.DEFINE_string('workdir', 'runs/colm', 'Where rows, runs and results go.')

# Generators of reasoning-gym with short answers, and their shares of the mixture.
SHARES = {
  'chain_sum': 0.30,
  'basic_arithmetic': 0.22,
  'spell_backward': 0.16,
  'letter_counting': 0.11,
  'gcd': 0.07,
  'number_sequence': 0.05,
  'products': 0.04,
  'base_conversion': 0.03,
  'time_intervals': 0.01,
  'lcm': 0.01,
}
CHARACTERS = 320, 40  # Of a question and of an answer, at most: what fits a sequence.


def main(_):
  logging.set_verbosity(logging.WARNING)
  directory = pathlib.Path(WORKDIR.value)
  files = {name: directory / f'{name}.jsonl' for name in ('train', 'held_out')}
  counts = {name: max(1, round(share * ROWS.value)) for name, share in SHARES.items()}
  write_rows(files['train'], counts, seed=0)
  write_rows(files['held_out'], dict.fromkeys(SHARES, HELD_OUT.value), seed=10**6)
  results = []
  for name, select in selections(counts).items():
    if RUNS.value and name not in RUNS.value:
      continue
    path = directory / f'{name}.json'
    if not path.exists():
      config = make_config(files, select)
      path.write_text(json.dumps(run(config, directory / name), indent=2) + '\n')
    results.append(json.loads(path.read_text()) | {'name': name})
    write(results, directory)
  print((directory / 'results.md').read_text())


def selections(counts: dict[str, int]) -> dict[str, dict]:
  """Returns the runs: what of `config.select` each sets."""
  numbers = {name: i for i, name in enumerate(sorted(counts))}
  even = sum(counts.values()) / len(counts)
  listed = '_'.join(str(i) for name, i in sorted(numbers.items()) if counts[name] < even)
  half, sources = POOL.value // 2, len(counts)
  # What `memjax.compat.colm` builds, but for features that are no numbers, of which there are none.
  single = dict(features='zeroth_order', directions=1, redraw=False, keep_sources=listed)
  return {
    'colm': dict(name='colm', keep=half, sources=sources),
    'official': dict(name='colm', keep=half, sources=sources, **single),
    'random_half': dict(name='random', keep=half),
    'all': dict(name='none'),
  }


def write_rows(path: pathlib.Path, counts: dict[str, int], seed: int) -> None:
  """Writes questions of every source with their answers, if they are not there yet."""
  if path.exists():
    return
  try:
    import reasoning_gym
  except ImportError as error:
    raise SystemExit(
      f'the mixture comes from reasoning-gym ({error}); pip install reasoning-gym==0.1.25'
    ) from error
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = []
  for source, count in counts.items():
    # Longer ones are passed over, so more are asked for.
    drawn = reasoning_gym.create_dataset(source, size=20 * count + 100, seed=seed)
    rows += take(source, drawn, count)
  # Whole or not at all: a killed run must not leave half a mixture.
  part = path.with_suffix('.part')
  part.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  part.rename(path)


def take(source: str, drawn, count: int) -> list[dict]:
  """Returns the first rows that are short enough."""
  rows = []
  for i in range(len(drawn)):
    example = drawn[i]
    question, answer = str(example['question']), str(example['answer'])
    if len(question) <= CHARACTERS[0] and 0 < len(answer) <= CHARACTERS[1]:
      rows.append({'instruction': question, 'output': answer, 'source': source})
    if len(rows) == count:
      return rows
  raise SystemExit(f'{source} has {len(rows)} short questions, not {count}; lower --rows')


def make_config(files: dict[str, pathlib.Path], select: dict):
  """Returns the config of one run."""
  c = config_lib.default()
  pretrained = MODEL.value not in models.PRESETS
  if pretrained:
    c.load = MODEL.value
  else:
    c.model = MODEL.value
    c.data.tokenizer = 'bytes'
  if TOKENIZER.value:
    c.data.tokenizer = TOKENIZER.value
  c.task.name = 'instruct'
  c.task.train, c.task.dev = str(files['train']), str(files['held_out'])
  c.task.template = 'Question: {instruction}\nAnswer:'
  c.task.new_tokens = ANSWER.value
  c.adapter = config_lib.adapter('lora', rank=RANK.value, alpha=2.0 * RANK.value)
  c.optimizer = config_lib.optimizer('adamw', learning_rate=RATE.value)
  c.schedule.name, c.schedule.warmup_ratio, c.schedule.final_ratio = 'linear', 0.03, 0.0
  c.remat = 'full'
  c.steps, c.batch_size, c.seq_len, c.seed = STEPS.value, POOL.value, LENGTH.value, SEED.value
  c.select.update(parts=max(1, POOL.value // 16), **select)
  # Training measures nothing on the way: what counts is by source, at the end.
  c.log_every, c.eval_every, c.checkpoint.every, c.sample.tokens = 10, 0, 50, 0
  config_lib.validate(c)
  return c.lock()


def run(config, directory: pathlib.Path) -> dict:
  """Trains, and measures every source."""
  state = train(config, directory)['state']
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  parts = build_lib.build(config, mesh)
  data = load_data(config, parts.model)
  params = parts.view(state['params'])
  batch = build_lib.batch_shapes(min(32, config.batch_size), config.seq_len, mesh)
  size = batch['tokens'].shape[0]
  answers = evaluation.predict(parts.model, params, data.task, data.validation, size)
  exact, loss = {}, {}
  for source in data.train.sources:
    pairs = [pair for pair in zip(data.validation.examples, answers) if pair[0].source == source]
    found = [answer for _, answer in pairs]
    exact[source] = float(METRICS['exact_match'](found, [e.label for e, _ in pairs]))
    split = dataclasses.replace(data.validation, examples=[e for e, _ in pairs])
    loss[source] = evaluate(parts.eval_step, state['params'], split, batch)['eval/loss']
  lines = [line for line in metrics.read(directory) if 'train/loss' in line]
  seconds = sorted(x for line in lines if (x := line.get('throughput/step_seconds')))
  return {
    'loss': loss,
    'exact_match': exact,
    'steps': config.steps,
    'train_loss': [(line['step'], line['train/loss']) for line in lines],
    # The fastest tenth of the logged intervals: other work on the machine slows the rest.
    'step_seconds': seconds[len(seconds) // 10] if seconds else None,
    'device': jax.devices()[0].device_kind,
  }


LABELS = {
  'colm': 'CoLM',
  'official': 'CoLM, one direction',
  'random_half': 'random half',
  'all': 'whole pool',
}


def write(results: list[dict], directory: pathlib.Path) -> None:
  """Writes the results so far: all of them as JSON, the table, the picture."""
  (directory / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
  (directory / 'results.md').write_text(table(results))
  draw(results, directory / 'results.png')


def table(results: list[dict]) -> str:
  """Returns a markdown table: a row a source, loss and exact answers of every run."""
  names = [LABELS[r['name']] for r in results]
  lines = [
    '| source | ' + ' | '.join(names) + ' |',
    '| --- |' + ' ---: |' * len(names),
  ]
  sources = sorted(SHARES, key=SHARES.get, reverse=True)
  cell = lambda r, s: f'{r["loss"][s]:.3f}, {100 * r["exact_match"][s]:.0f} %'
  lines += [f'| {s} | ' + ' | '.join(cell(r, s) for r in results) + ' |' for s in sources]
  means = [f'{mean(r["loss"]):.3f}, {100 * mean(r["exact_match"]):.1f} %' for r in results]
  lines.append('| **mean of sources** | ' + ' | '.join(means) + ' |')
  return '\n'.join(lines) + '\n'


def mean(values: dict[str, float]) -> float:
  return sum(values.values()) / len(values)


def draw(results: list[dict], path: pathlib.Path) -> None:
  """Draws the loss of every source, largest first, and the share of exact answers."""
  figure = Figure(figsize=(11, 4.6), layout='constrained')
  FigureCanvasAgg(figure)
  sources = sorted(SHARES, key=SHARES.get, reverse=True)
  width = 0.8 / len(results)
  for axes, field in zip(figure.subplots(1, 2), ('loss', 'exact_match'), strict=True):
    for i, r in enumerate(results):
      places = [x + i * width for x in range(len(sources))]
      axes.bar(places, [r[field][s] for s in sources], width, label=LABELS[r['name']])
    axes.set_xticks(range(len(sources)), sources, rotation=60, ha='right', fontsize='small')
    axes.spines[['top', 'right']].set_visible(False)
  first, second = figure.axes
  first.set(title='loss of a token of the answer (nats)')
  second.set(title='share of exact answers', ylim=(0, 1))
  first.legend(frameon=False, fontsize='small')
  figure.savefig(path, dpi=150)


if __name__ == '__main__':
  app.run(main)
