"""Fine-tunes a pretrained decoder on a task by prompt, with and without gradients: one table, one
picture.

    python experiments/finetune_decoder.py --model=FOLDER --task=sst2 --train=train.jsonl \
        --test=test.jsonl --steps=200

FOLDER is one of Hugging Face, or a GGUF file; `--task` a key of `memjax.tasks.TASKS`. Compares the
untrained model, LoRA, AdamW layer by layer, MeZO and LOZO: accuracy over updates, time and peak
memory of the compiled step. Methods without gradients get `--times` as many updates, as they need
more and each is cheaper. A finished run is not repeated; a killed one resumes. Leaves
`results.json`, `results.md` and `results.png` in `--workdir`, and each run's own files below it.
"""

import json
import pathlib
import statistics

from absl import app, flags, logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import memjax
from memjax import config as config_lib
from memjax import metrics
from memjax.train import train

MODEL = flags.DEFINE_string('model', None, 'Folder of a decoder, or a GGUF file.', required=True)
TASK = flags.DEFINE_string('task', 'sst2', 'A key of memjax.tasks.TASKS.')
TRAIN = flags.DEFINE_string('train', None, 'File to train on.', required=True)
TEST = flags.DEFINE_string('test', None, 'File to evaluate on.', required=True)
WORKDIR = flags.DEFINE_string('workdir', 'runs/finetune_decoder', 'Where results go.')
METHODS = flags.DEFINE_list('methods', [], 'Which to run; all if none is named.')
STEPS = flags.DEFINE_integer('steps', 200, 'Updates of the methods with gradients.')
TIMES = flags.DEFINE_integer('times', 4, 'Those of the others, over these.')
BATCH = flags.DEFINE_integer('batch', 16, 'Rows an update.')
LENGTH = flags.DEFINE_integer('seq_len', 96, 'Tokens a row.')
EXAMPLES = flags.DEFINE_integer('examples', 1000, 'Rows to train on.')
TESTED = flags.DEFINE_integer('tested', 400, 'Rows to evaluate on.')
EVALUATIONS = flags.DEFINE_integer(
  'evaluations', 4, 'A run, beside the one of the untrained model.'
)
SEED = flags.DEFINE_integer('seed', 0, 'Of the rows, their order and the noise.')

GIB = 2**30
VALUES = ('mezo', 'lozo')  # Methods that take values of the loss.
LABELS = {
  'lora': 'LoRA, rank 8',
  'adamw': 'AdamW, layer by layer',
  'mezo': 'MeZO',
  'lozo': 'LOZO, rank 2',
}


def main(_):
  logging.set_verbosity(logging.WARNING)  # Checkpointing tells every step it takes at INFO.
  directory = pathlib.Path(WORKDIR.value)
  untrained = measure_untrained(directory)
  rows = []
  for method in METHODS.value or LABELS:
    train(config_of(method), directory / method)
    rows.append(result(directory / method, method))
    rows[-1]['accuracy'][0] = untrained
    (directory / 'results.json').write_text(json.dumps(rows, indent=2) + '\n')
  (directory / 'results.md').write_text(table(rows))
  print(table(rows))
  draw(rows, directory)


def config_of(method: str):
  """Returns the config of one run."""
  c = config_lib.default()
  c.load, c.seed = MODEL.value, SEED.value
  c.task.name, c.task.train, c.task.test = TASK.value, TRAIN.value, TEST.value
  c.task.examples, c.task.test_examples = EXAMPLES.value, TESTED.value
  c.batch_size, c.seq_len = BATCH.value, LENGTH.value
  c.steps = STEPS.value * (TIMES.value if method in VALUES else 1)
  c.schedule.name = 'constant' if method in VALUES else 'linear'
  c.schedule.warmup_ratio, c.schedule.final_ratio = 0.0 if method in VALUES else 0.1, 0.0
  c.log_every = max(1, c.steps // 40)
  c.eval_every = c.checkpoint.every = max(1, c.steps // EVALUATIONS.value)
  c.checkpoint.keep = 1
  c.sample.tokens = 0
  match method:
    case 'lora':
      c.adapter = config_lib.adapter('lora', rank=8, alpha=16.0)
      c.optimizer = config_lib.optimizer('adamw', learning_rate=5e-4)
    case 'adamw':
      c.step, c.remat = 'layerwise', 'full'
      c.optimizer = config_lib.optimizer('adamw', learning_rate=2e-5)
    case 'mezo':
      c.step = 'zeroth_order'
      c.optimizer = config_lib.optimizer('mezo', learning_rate=1e-6, eps=1e-3)
    case 'lozo':
      c.step = 'zeroth_order'
      c.optimizer = config_lib.optimizer('lozo', learning_rate=1e-6, eps=1e-3, rank=2)
  return c


def measure_untrained(directory: pathlib.Path) -> float:
  """Returns the accuracy of the pretrained model, measured once."""
  report = directory / 'untrained' / 'evaluation.json'
  if not report.is_file():
    memjax.evaluate(MODEL.value, config=config_of('adamw'), directory=report.parent)
  return json.loads(report.read_text())['tasks'][TASK.value]['accuracy']


def result(directory: pathlib.Path, method: str) -> dict:
  """Returns what a finished run left."""
  lines = metrics.read(directory)
  scores = {line['step']: line['eval/accuracy'] for line in lines if 'eval/accuracy' in line}
  losses = {line['step']: line['eval/loss'] for line in lines if 'eval/loss' in line}
  receipt = json.loads((directory / 'memory.json').read_text())
  seconds = [line['throughput/step_seconds'] for line in lines if 'throughput/step_seconds' in line]
  return {
    'method': method,
    'accuracy': scores,
    'loss': losses,
    'peak_gib': receipt['peak_bytes'] / GIB,
    'step_seconds': statistics.median(seconds) if seconds else None,
  }


def table(rows: list[dict]) -> str:
  """Returns the results in Markdown."""
  lines = ['| method | updates | accuracy | peak | s/update |', '|---|---|---|---|---|']
  lines.append(f'| untrained | 0 | {rows[0]["accuracy"][0]:.3f} | | |')
  for row in rows:
    steps, accuracy = max(row['accuracy'].items())
    seconds = row['step_seconds']
    shown = '' if seconds is None else f'{seconds:.2f}'
    label, peak = LABELS[row['method']], f'{row["peak_gib"]:.2f} GiB'
    lines.append(f'| {label} | {steps} | {accuracy:.3f} | {peak} | {shown} |')
  return '\n'.join(lines) + '\n'


def draw(rows: list[dict], directory: pathlib.Path) -> None:
  """Draws accuracy over the share of the updates made."""
  figure = Figure(figsize=(6, 4), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for row in rows:
    steps, scores = zip(*sorted(row['accuracy'].items()))
    axes.plot(steps, scores, marker='o', label=LABELS[row['method']])
  axes.set(xlabel='updates', ylabel='accuracy', xscale='symlog')
  axes.legend()
  figure.savefig(directory / 'results.png', dpi=150)


if __name__ == '__main__':
  app.run(main)
