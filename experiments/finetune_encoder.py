"""Fine-tunes a pretrained encoder on labelled sentences by several methods: one table, one picture.

    python experiments/finetune_encoder.py --model=FOLDER --train=train.jsonl --dev=dev.jsonl
    python experiments/finetune_encoder.py ... --methods=galore_r4 --rates=1e-4,3e-4 --examples=2000

FOLDER is one of Hugging Face, with `tokenizer.json`; rows of the files have the fields `text` and
`label`. The second form searches learning rates on a part of the rows. A finished run is not
repeated. Leaves a JSON file for each run, `results.json`, `results.md` and `results.png` in
`--workdir`.

All methods see the same batches of a seed, sorted by length within windows so that little of a
batch is padding. Each trains everything but LoRA, which trains its factors and the head.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from memjax import adapters, models, optimizers, schedules, weights
from memjax.naming import nearest
from memjax.steps import whole_tree

MODEL = flags.DEFINE_string('model', None, 'Hugging Face folder of an encoder.', required=True)
TRAIN = flags.DEFINE_string('train', None, 'JSONL file to train on.', required=True)
DEV = flags.DEFINE_string('dev', None, 'JSONL file to evaluate on.', required=True)
WORKDIR = flags.DEFINE_string('workdir', 'runs/finetune_encoder', 'Where results go.')
METHODS = flags.DEFINE_list('methods', [], 'Which to run; all if none is named.')
RATES = flags.DEFINE_list('rates', [], "Learning rates to try instead of each method's own.")
SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs a method; of the head, the order and the noise.')
EXAMPLES = flags.DEFINE_integer('examples', 0, 'Trains on the first so many rows; 0 on all.')
EPOCHS = flags.DEFINE_integer('epochs', 1, 'Passes over the rows.')
REFERENCES = flags.DEFINE_list('references', [], 'Accuracies to compare with: NAME=NUMBER,...')

BATCH = 32
LENGTHS = (24, 32, 48, 64)  # Tokens a row; a batch has the least that holds its longest row.
WINDOW = 32  # Batches whose rows are sorted by length together.
WARMUP = 0.06  # Of the steps; then straight to zero.
CLIP_NORM = 1.0
EVALUATIONS = 3  # A run.
MIB = 2**20


class Method(NamedTuple):
  """A way to fine-tune."""

  label: str
  rate: float
  transform: Callable[[optax.Schedule], optax.GradientTransformation]
  adapter: adapters.LoRA | None = None


def _galore(rank: int, scale: float) -> Callable:
  """With the scales that its authors took for GLUE."""
  return lambda rate: optimizers.low_rank.galore(rate, rank, refresh_every=100, scale=scale)


def _lora(rank: int) -> adapters.LoRA:
  return adapters.LoRA(rank=rank, alpha=16, rest='^head/')


METHODS_BY_NAME = {
  'adamw': Method('AdamW', 1e-4, optimizers.dense.adamw),
  'adamw8bit': Method('AdamW, 8 bits', 1e-4, optimizers.quantised.adamw8bit),
  'galore_r4': Method('GaLore, rank 4', 5e-4, _galore(4, 4.0)),
  'galore_r8': Method('GaLore, rank 8', 5e-4, _galore(8, 2.0)),
  'apollo_mini': Method('APOLLO-Mini', 3e-4, optimizers.low_rank.apollo_mini),
  'lora_r4': Method('LoRA, rank 4', 2e-3, optimizers.dense.adamw, _lora(4)),
  'lora_r8': Method('LoRA, rank 8', 2e-3, optimizers.dense.adamw, _lora(8)),
}


class Rows(NamedTuple):
  """Tokenised sentences."""

  tokens: list[list[int]]
  labels: np.ndarray  # i32[n].


def main(_):
  directory = pathlib.Path(WORKDIR.value)
  directory.mkdir(parents=True, exist_ok=True)
  tokenizer = Tokenizer.from_file(str(pathlib.Path(MODEL.value) / 'tokenizer.json'))
  train, dev = (read_rows(path.value, tokenizer) for path in (TRAIN, DEV))
  train = Rows(train.tokens[: EXAMPLES.value or None], train.labels[: EXAMPLES.value or None])
  trainers = {}  # Seeds of a method share its compiled programs.
  results = []
  for seed in range(SEEDS.value):
    for name, method in chosen_methods().items():
      path = directory / f'{name}-{seed}.json'
      if not path.exists():
        if name not in trainers:
          trainers[name] = Trainer(method, steps_of(train))
        path.write_text(json.dumps(trainers[name].run(seed, train, dev), indent=2) + '\n')
      result = json.loads(path.read_text())
      check_same(path, result, {'rate': method.rate, 'steps': steps_of(train)})
      results.append(result | {'name': name, 'label': method.label})
      write(results, directory)
  print((directory / 'results.md').read_text())


def check_same(path: pathlib.Path, result: dict, wanted: dict) -> None:
  """Refuses to compare with a run that was of something else."""
  different = [name for name, value in wanted.items() if result[name] != value]
  if different:
    raise SystemExit(
      f'{path} is of a run with another {", ".join(different)}; choose another --workdir, or '
      'delete it'
    )


def chosen_methods() -> dict[str, Method]:
  """Returns the methods to run, each at its own learning rate or at each of `--rates`."""
  for name in METHODS.value:
    if name not in METHODS_BY_NAME:
      raise SystemExit(f'no method is called {name!r}; {nearest(name, METHODS_BY_NAME)}')
  names = METHODS.value or METHODS_BY_NAME
  methods = {name: METHODS_BY_NAME[name] for name in names}
  if not RATES.value:
    return methods
  return {
    f'{name}-{rate}': method._replace(rate=float(rate), label=f'{method.label}, {rate}')
    for name, method in methods.items()
    for rate in RATES.value
  }


# Data.


def read_rows(path: str, tokenizer: Tokenizer) -> Rows:
  """Reads and tokenises a file, cutting what is longer than the longest batch."""
  lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
  rows = [json.loads(line) for line in lines]
  tokenizer.no_padding()
  tokenizer.enable_truncation(LENGTHS[-1])
  encoded = tokenizer.encode_batch([row['text'] for row in rows])
  return Rows([row.ids for row in encoded], np.array([row['label'] for row in rows], np.int32))


def steps_of(rows: Rows) -> int:
  """Returns how many updates a run has."""
  return EPOCHS.value * len(epoch(rows, np.random.default_rng(0)))


def epoch(rows: Rows, rng: np.random.Generator) -> list[np.ndarray]:
  """Returns the rows of each batch, in random order; within a batch they are about as long."""
  order = rng.permutation(len(rows.tokens))
  lengths = np.array([len(rows.tokens[i]) for i in order])
  windows = np.arange(len(order)) // (BATCH * WINDOW)
  order = order[np.lexsort((lengths, windows))]
  batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
  return [batches[i] for i in rng.permutation(len(batches))]


def batch_of(rows: Rows, indices: np.ndarray) -> dict[str, np.ndarray]:
  """Returns a batch as the model takes it, filled up with rows of no weight."""
  length = next(n for n in LENGTHS if n >= max(len(rows.tokens[i]) for i in indices))
  tokens, mask = (np.zeros((BATCH, length), np.int32) for _ in range(2))
  labels, row_weights = np.zeros(BATCH, np.int32), np.zeros(BATCH, np.float32)
  for row, i in enumerate(indices):
    ids = rows.tokens[i]
    tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    labels[row], row_weights[row] = rows.labels[i], 1
  return {'tokens': tokens, 'attention_mask': mask, 'labels': labels, 'weights': row_weights}


# Training.


class Trainer:
  """Runs of one method, which share what is compiled."""

  def __init__(self, method: Method, steps: int):
    self.method, self.steps = method, steps
    schedule = schedules.linear(method.rate, steps=steps, warmup_steps=int(WARMUP * steps))
    self.transform = method.transform(schedule)
    self.model = models.huggingface.describe(MODEL.value, **HEAD)
    step = whole_tree.make_train_step(self.model.loss, self.transform, clip_norm=CLIP_NORM)
    self.step = jax.jit(step, donate_argnums=0)
    self.logits = jax.jit(self.model.logits)

  def init(self, seed: int) -> dict[str, Any]:
    """Returns the training state before the first update."""
    head_key, adapter_key = jax.random.split(jax.random.key(seed))
    _, params = models.load(MODEL.value, 'float32', key=head_key, **HEAD)
    if self.method.adapter is not None:
      params = adapters.attach(params, self.method.adapter, adapter_key)
    # Compiled, so that no two leaves share a buffer, which could not be donated twice.
    opt = jax.jit(self.transform.init)(weights.trained(params))
    state = {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt': opt}
    # Bound to the device like what a step returns, so that the second step is not compiled anew.
    return jax.device_put(state, jax.local_devices()[0])

  def run(self, seed: int, train: Rows, dev: Rows) -> dict[str, Any]:
    """Trains and evaluates; returns what is to be kept of it."""
    state, rng = self.init(seed), np.random.default_rng(seed)
    count = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    sizes = {
      'state_bytes': count(state['opt']),
      'trained_bytes': count(weights.trained(state['params'])),
      'parameter_bytes': count(state['params']),
    }
    curve, losses, seconds = [], [], []
    batches = [b for _ in range(EPOCHS.value) for b in epoch(train, rng)]
    marks = {round(self.steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    for step, indices in enumerate(batches, 1):
      batch = batch_of(train, indices)
      start = time.perf_counter()
      state, metrics = self.step(state, batch)
      losses.append(float(metrics['train/loss']))  # Waits for the step.
      seconds.append((batch['tokens'].shape[1], time.perf_counter() - start))
      if step in marks:
        curve.append((step, self.accuracy(state['params'], dev)))
        print(f'{self.method.label}, seed {seed}, step {step}: {curve[-1][1]:.4f}', flush=True)
    return {
      'seed': seed,
      'rate': self.method.rate,
      'examples': len(train.tokens),
      'steps': self.steps,
      'accuracy': curve[-1][1],
      'curve': curve,
      'train_loss': statistics.mean(losses[-len(losses) // 5 :]),
      'step_seconds': step_seconds(seconds),
      **sizes,
    }

  def accuracy(self, params: Any, rows: Rows) -> float:
    """Returns the share of rows whose label has the largest logit."""
    order = np.argsort([len(tokens) for tokens in rows.tokens], kind='stable')
    right = 0
    for i in range(0, len(order), BATCH):
      batch = batch_of(rows, order[i : i + BATCH])
      logits = self.logits(params, batch['tokens'], batch['attention_mask'])
      hits = np.argmax(logits, axis=1) == batch['labels']
      right += int(np.sum(hits * batch['weights']))
    return right / len(order)


HEAD = dict(task='classification', labels=2, pool='mean', remat='none')


def step_seconds(seconds: list[tuple[int, float]]) -> float:
  """Returns the time of a step, on average over batches of all lengths.

  Of each length, the fastest tenth: other work on the machine slows the rest.
  """
  by_length = {}
  for length, elapsed in seconds:
    by_length.setdefault(length, []).append(elapsed)
  fastest = {n: np.quantile(times, 0.1) for n, times in by_length.items()}
  return float(np.mean([fastest[length] for length, _ in seconds]))


# Results.


def write(results: list[dict], directory: pathlib.Path) -> None:
  """Writes the table, the picture and all runs, of what has finished so far."""
  groups = {}
  for result in results:
    groups.setdefault(result['name'], []).append(result)
  (directory / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
  (directory / 'results.md').write_text(table(groups))
  draw(groups, directory / 'results.png')


def references() -> dict[str, float]:
  """Returns what to compare with."""
  pairs = [text.rpartition('=') for text in REFERENCES.value]
  return {name.strip(): float(number) for name, _, number in pairs}


def table(groups: dict[str, list[dict]]) -> str:
  """Returns a table in Markdown."""
  lines = [
    '| method | accuracy | spread | seeds | learning rate | trained MiB | state MiB | step s |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for name, number in references().items():
    lines.append(f'| {name} | {number:.3f} | | | | | | |')
  for runs in groups.values():
    accuracies, first = [run['accuracy'] for run in runs], runs[0]
    spread = f'{statistics.stdev(accuracies):.4f}' if len(runs) > 1 else ''
    seconds = min(run['step_seconds'] for run in runs)
    lines.append(
      f'| {first["label"]} | {statistics.mean(accuracies):.4f} | {spread} | {len(runs)} '
      f'| {first["rate"]:g} | {first["trained_bytes"] / MIB:.2f} '
      f'| {first["state_bytes"] / MIB:.2f} | {seconds:.3f} |'
    )
  return '\n'.join(lines) + '\n'


def draw(groups: dict[str, list[dict]], path: pathlib.Path) -> None:
  """Draws accuracy over steps, and its last value over the bytes of optimizer state."""
  figure = Figure(figsize=(11, 4.2), layout='constrained')
  FigureCanvasAgg(figure)
  curves, points = figure.subplots(1, 2, sharey=True)
  for runs in groups.values():
    steps, accuracies = np.array([run['curve'] for run in runs]).transpose(2, 0, 1)
    (line,) = curves.plot(steps[0], accuracies.mean(0), marker='.', label=runs[0]['label'])
    last, size = accuracies[:, -1], runs[0]['state_bytes'] / MIB
    spread = last.std(ddof=1) if len(last) > 1 else 0
    points.errorbar(size, last.mean(), spread, fmt='o', color=line.get_color(), capsize=3)
  for axes in (curves, points):
    for number in references().values():
      axes.axhline(number, color='gray', linestyle=':', linewidth=1)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
  for name, number in references().items():
    curves.annotate(name, (0, number), fontsize='x-small', color='gray', va='bottom')
  curves.set(xlabel='step', ylabel='accuracy', xlim=(0, None))
  points.set(xlabel='optimizer state (MiB)', xscale='log')
  curves.legend(frameon=False, fontsize='small')
  figure.savefig(path, dpi=150)


if __name__ == '__main__':
  app.run(main)
