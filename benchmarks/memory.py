"""Trains for a few steps on the device at hand, and puts what its allocator saw beside the receipt.

    python benchmarks/memory.py 'configs/adalomo_llama7b.py' --batch_size=1 --seq_len=2048
    python benchmarks/memory.py configs/*_llama7b.py --json=memory.json

Configs run one after another, each in a process of its own, on random tokens. `before` is what lay
on the device before the first step (parameters, optimizer state, batch), `peak` the most that ever
did since; the receipt is the compiler's forecast of both. A CPU does not count: take a GPU or TPU.
"""

import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from memjax import build as build_lib
from memjax import config as config_lib
from memjax import plan, sharding
from memjax.evaluate import place

BATCH = flags.DEFINE_integer('batch_size', 1, 'Sequences an update, in one micro-batch.')
LENGTH = flags.DEFINE_integer('seq_len', 0, 'Tokens a sequence; 0 leaves each config its own.')
STEPS = flags.DEFINE_integer('steps', 3, 'Updates.')
JSON = flags.DEFINE_string('json', '', 'Also writes the rows here.')
ONE = flags.DEFINE_bool('one', False, 'Measures in this process and prints a line of JSON.')
GIB = 2**30


def main(argv):
  logging.set_verbosity(logging.WARNING)
  specs = argv[1:]
  if ONE.value:
    print(json.dumps(measure(specs[0])))
    return
  rows = [in_child(spec) for spec in specs]
  Console().print(table(rows))
  if JSON.value:
    pathlib.Path(JSON.value).write_text(json.dumps(rows, indent=2) + '\n')


def in_child(spec: str) -> dict:
  """Measures in a process of its own, whose counter starts at zero."""
  passed = [f'--{flag.name}={flag.value}' for flag in (BATCH, LENGTH, STEPS)]
  command = [sys.executable, __file__, '--one', *passed, spec]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    return {'name': config_lib.run_name(spec), 'error': done.stderr.strip().splitlines()[-1:]}
  return json.loads(done.stdout.splitlines()[-1])


def measure(spec: str) -> dict:
  """Compiles, starts and trains one config."""
  c = config_lib.load(spec)
  c.batch_size, c.accumulate, c.steps = BATCH.value, 1, STEPS.value
  c.seq_len = LENGTH.value or c.seq_len
  parts = build_lib.build(c, sharding.make_mesh(devices=jax.devices()[:1]))
  step, receipt = plan.compile_here(c, parts)
  if step is None:
    raise SystemExit(plan.verdict(receipt))
  state = jax.block_until_ready(parts.init(build_lib.root_key(c, 'params')))
  started = used('peak_bytes_in_use')
  seconds = []
  for i in range(STEPS.value):
    batch = place(lambda start, stop, i=i: random_rows(parts, i, start, stop), parts.batch)
    before = used('bytes_in_use')
    start = time.perf_counter()
    state, metrics = step(state, batch)
    loss = float(metrics['train/loss'])  # Waits for the step.
    seconds.append(time.perf_counter() - start)
  return {
    'name': config_lib.run_name(spec),
    'device': jax.devices()[0].device_kind,
    'batch_size': c.batch_size,
    'seq_len': c.seq_len,
    'before': before,
    'initialising': started,
    'peak': used('peak_bytes_in_use'),
    'receipt_state': sum(plan.argument_parts(parts.state, parts.batch).values()),
    'receipt_peak': receipt['peak_bytes'],
    'host_bytes': receipt['host_bytes'],
    'compile_seconds': receipt['compile_seconds'],
    'step_seconds': min(seconds),
    'loss': loss,
  }


def random_rows(parts, seed: int, start: int, stop: int) -> dict[str, np.ndarray]:
  """Returns rows of a batch of random tokens."""
  length = parts.batch['tokens'].shape[-1]
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, parts.model.vocab, (stop, length + 1), np.int32)[start:]
  rows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:]}
  rows['weights'] = np.ones(rows['tokens'].shape, np.float32)
  return {name: rows[name] for name in parts.batch if name in rows}


def used(counter: str) -> int:
  """Returns bytes of the first device."""
  stats = jax.devices()[0].memory_stats()
  if stats is None:
    raise SystemExit(f'{jax.devices()[0].device_kind} does not count its bytes; take a GPU or TPU')
  return stats[counter]


def table(rows: list[dict]) -> Table:
  """Returns measured beside forecast."""
  out = Table(title='Memory of a device: forecast and measured (GiB)')
  names = ('config', 'state', 'measured', 'peak', 'measured', 'ratio', 'step s', 'compile s')
  for name in names:
    out.add_column(name, justify='left' if name == 'config' else 'right')
  for row in rows:
    if 'error' in row:
      out.add_row(row['name'], str(row['error']))
      continue
    sizes = (row[k] / GIB for k in ('receipt_state', 'before', 'receipt_peak', 'peak'))
    out.add_row(
      row['name'],
      *(f'{size:.2f}' for size in sizes),
      f'{row["peak"] / row["receipt_peak"]:.3f}',
      f'{row["step_seconds"]:.3f}',
      f'{row["compile_seconds"]:.0f}',
    )
  return out


if __name__ == '__main__':
  app.run(main)
