"""Starts `run.py` in a process of its own, as a user does; can signal it at an exact moment.

As a script it is that process: `python tests/launch.py MOMENT SIGNAL run.py --config=...` runs the
command and sends itself the signal at a moment such as `step=6`. A signal sent from outside would
land on another step each time.
"""

import fcntl
import functools
import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = 'configs/quickstart.py:smoke'


def start(workdir, *flags, moment='', send=signal.SIGTERM, config=SMOKE, cache=None, **environment):
  """Starts a run on CPU; returns its `Popen`, whose stdout and stderr are pipes of text."""
  command = [sys.executable]
  if moment:
    command += [__file__, moment, str(int(send))]
  command += ['run.py', *([f'--config={config}'] if config else []), f'--workdir={workdir}', *flags]
  environment = dict(JAX_PLATFORMS='cpu', PYTHONPATH=str(ROOT), **environment)
  if jax.__version_info__ < (0, 11):  # As in this process, see conftest.py.
    quickly = '--xla_cpu_use_fusion_emitters=false'
    environment.setdefault('XLA_FLAGS', f'{quickly} {os.environ["XLA_FLAGS"]}')
  if cache:  # Compiled programs and tokens, shared between the runs of a test file.
    environment |= {
      'XDG_CACHE_HOME': str(cache),
      'JAX_COMPILATION_CACHE_DIR': str(cache / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
  pipe = subprocess.PIPE
  return subprocess.Popen(
    command, cwd=ROOT, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True
  )


def finish(process, timeout=240):
  """Waits for a run; returns it as a `CompletedProcess`."""
  try:
    out, err = process.communicate(timeout=timeout)
  finally:
    process.kill()
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*args, **kwargs):
  return finish(start(*args, **kwargs))


def once(tmp_path_factory, name, make):
  """Returns a directory that `make(directory)` fills once for all workers of pytest-xdist."""
  base = tmp_path_factory.getbasetemp()
  base = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  with open(base / f'{name}.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (base / f'{name}.made').exists():
      shutil.rmtree(base / name, ignore_errors=True)
      (base / name).mkdir()
      make(base / name)
      (base / f'{name}.made').touch()
  return base / name


def lines(workdir):
  """Lines of metrics without those that measure the machine."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [
    {k: v for k, v in row.items() if not k.startswith(('throughput/', 'memory/'))} for row in rows
  ]


def losses(workdir, kind='train/loss'):
  return {row['step']: row[kind] for row in lines(workdir) if kind in row}


def checkpoints(workdir):
  """Steps of the complete checkpoints."""
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir() if p.name.isdigit())


def digests(workdir, step):
  """What a checkpoint records of each leaf: path -> shape, dtype and a digest of its bits."""
  file = workdir / 'checkpoints' / str(step) / 'metadata' / 'metadata'
  return json.loads(file.read_text())['leaves']


def _wrap(owner, name, before=None, after=None):
  """Calls `before(*args)` and `after(*args)` around the function `owner.name`."""
  inner = getattr(owner, name)

  @functools.wraps(inner)
  def outer(*args, **kwargs):
    if before:
      before(*args, **kwargs)
    result = inner(*args, **kwargs)
    if after:
      after(*args, **kwargs)
    return result

  setattr(owner, name, outer)


def _arm(moment, send):
  """Arranges for `send()` at the moment: import, data, compile, step=N, evaluate=N, save=N, never.

  Also does what the environment asks for: SECONDS_A_STEP to sleep; ROWS, a file for the rows of
  each training batch that this process reads.
  """
  kind, _, number = moment.partition('=')
  number = int(number or 0)
  if kind == 'import':
    sys.meta_path.insert(0, _Finder(send))
    return
  import memjax.evaluate
  import memjax.train
  from memjax import checkpoint, data, metrics

  seen = {'step': 0, 'batches': 0}

  def wrote(writer, step, values):
    seen.update(step=step, batches=0)
    time.sleep(float(os.environ.get('SECONDS_A_STEP', 0)))
    if kind == 'step' and step == number and 'train/loss' in values:
      send()

  def evaluates(*_):
    seen['batches'] += 1
    if kind == 'evaluate' and seen == {'step': number, 'batches': 2}:
      send()

  def read_rows(split, step, batch_size, start, stop, seed):
    if 'ROWS' in os.environ:
      with open(os.environ['ROWS'], 'a') as file:
        file.write(f'{start}:{stop}\n')

  def saved(checkpoints, state, step, *_, **__):
    if kind == 'save' and step == number:
      send()

  _wrap(metrics.MetricsWriter, 'write', after=wrote)
  _wrap(data.Split, 'rows', before=read_rows)
  _wrap(memjax.evaluate, 'place', before=evaluates)
  _wrap(checkpoint.Checkpoints, 'maybe_save', after=saved)
  if kind == 'data':
    _wrap(memjax.train, 'load_data', before=lambda *_: send())
  if kind == 'compile':
    _wrap(memjax.plan, 'compile_here', before=lambda *_: send())


class _Finder:
  """Finds nothing; signals when the training loop is about to be imported."""

  def __init__(self, send):
    self._send = send

  def find_spec(self, name, *_):
    if name == 'memjax.train':
      self._send()


def _main(moment, number, script, *flags):
  workdir = next(flag for flag in flags if flag.startswith('--workdir=')).partition('=')[2]

  def send():
    deadline = time.monotonic() + 60
    for step in filter(None, os.environ.get('WAIT_FOR_CHECKPOINT', '').split(',')):
      while not (pathlib.Path(workdir) / 'checkpoints' / step).exists():
        time.sleep(0.01)
        assert time.monotonic() < deadline, f'checkpoint {step} never appeared'
    os.kill(os.getpid(), int(number))

  signal.signal(signal.SIGINT, signal.default_int_handler)  # As in a terminal.
  _arm(moment, send)
  sys.argv = [script, *flags]
  runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
  _main(*sys.argv[1:])
