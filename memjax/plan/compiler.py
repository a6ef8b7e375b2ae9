"""Compiles programs for many targets, each in a process of its own.

A job says what to compile and for what (`memjax.plan.program.report` takes it). Its report is a
dict that can be written as JSON, and a failure is a report too: `error` is a sentence, `kind` one
word.
"""

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

from memjax import config as config_lib
from memjax.plan import program, targets

CHILD = [sys.executable, '-m', 'memjax.plan.worker']
WORKERS = 2  # Compiles at a time: each takes a core or two and some GiB.
# Without these libtpu asks a metadata server that is not there, JAX looks for a TPU at start-up,
# and two compilers at a time refuse each other.
ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'JAX_PLATFORMS': 'cpu',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def compile_jobs(
  jobs, *, workers=WORKERS, cache_dir=None, timeout=None, on_done=None
) -> list[dict]:
  """Compiles every job and returns their reports, in order.

  `local` is compiled in this process, which alone can open its devices; every other target in a
  child. Reports are cached by a hash of the lowered program, the target and the versions of JAX and
  of the compiler.

  Args:
    jobs: Dicts with `target` (a name) and `config` (a run's config as a dict, see `config_job`), or
      what `memjax.plan.exported.export_job` returns.
    workers: Children at a time.
    cache_dir: Directory of finished compiles; None is `default_cache_dir()`, '' caches nothing.
    timeout: Seconds for one job; None waits.
    on_done: Called as `on_done(index, report)` when a job is done, in the order they finish.

  Returns:
    Reports as `memjax.plan.program.report` describes them. One that failed has `target`, `error`,
    `message` (what the compiler said, or None), `fits: None`, and `kind`: 'target' (unknown),
    'missing' (a package), 'refused' (the mesh, the model or the config), 'compiler' (it rejected
    the program), 'failed' (any other exception), 'crashed', 'killed', 'timeout'.
  """
  cache_dir = default_cache_dir() if cache_dir is None else cache_dir
  jobs = [job | {'cache_dir': str(cache_dir) if cache_dir else None} for job in jobs]
  reports = [None] * len(jobs)
  children = _Children(timeout)
  pool = concurrent.futures.ThreadPoolExecutor(workers)
  try:
    running = {pool.submit(_compile, job, children): i for i, job in enumerate(jobs)}
    for done in concurrent.futures.as_completed(running):
      index = running[done]
      reports[index] = done.result()
      if on_done is not None:
        on_done(index, reports[index])
  finally:
    children.kill()  # Nothing is left when all went well; after an interrupt, what still compiles.
    pool.shutdown(cancel_futures=True)
  return reports


def config_job(config, target: str) -> dict:
  """Returns the job of compiling a config's training step for a target."""
  return {'target': target, 'config': config.to_dict()}


def default_cache_dir() -> pathlib.Path:
  """Returns the directory where finished compiles are kept."""
  return config_lib.user_cache() / 'plan'


class _Children:
  """The processes that are compiling; killing them all keeps more from starting."""

  def __init__(self, timeout):
    self._timeout = timeout
    self._running = set()
    self._lock = threading.Lock()
    self._closed = False

  def run(self, job: dict) -> tuple[int | None, str, str]:
    """Returns the exit code of a child (None when its time was up) and what it wrote and said."""
    with self._lock:
      if self._closed:
        return None, '', ''
      child = subprocess.Popen(
        CHILD,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors='replace',
        env=_environment(),
      )
      self._running.add(child)
    try:
      return _communicate(child, json.dumps(job), self._timeout)
    finally:
      with self._lock:
        self._running.discard(child)

  def kill(self) -> None:
    with self._lock:
      self._closed = True
      for child in self._running:
        child.kill()


def _environment() -> dict[str, str]:
  """The child finds the same memjax, wherever this process has it from."""
  root = str(pathlib.Path(__file__).parents[2])
  paths = [root, *filter(None, [os.environ.get('PYTHONPATH')])]
  return os.environ | ENVIRONMENT | {'PYTHONPATH': os.pathsep.join(paths)}


def _communicate(child, text, timeout):
  try:
    out, said = child.communicate(text, timeout=timeout)
    return child.returncode, out, said
  except subprocess.TimeoutExpired:
    child.kill()
    out, said = child.communicate()
    return None, out, said


def _compile(job, children) -> dict:
  name = job['target']
  try:
    target = targets.parse(name)
  except ValueError as e:
    return program.failed(name, 'target', str(e))
  try:
    targets.check_installed(target)
  except ValueError as e:
    return program.failed(name, 'missing', str(e))
  if target.platform == 'local':
    return program.report(job)
  code, out, said = children.run(job)
  try:
    return json.loads(out) if code == 0 else _died(name, code, said)
  except json.JSONDecodeError:
    return _died(name, code, said)


def _died(name, code, said) -> dict:
  message = said[-program.MESSAGE :]
  if code is None:
    return program.failed(
      name, 'timeout', f'{name}: the compiler was stopped when its time was up', message
    )
  if code == -signal.SIGKILL:
    return program.failed(
      name,
      'killed',
      f'{name}: the compiler was killed, as when this machine runs out of memory; close other '
      'programs, or compile one target at a time',
      message,
    )
  how = f'signal {-code}' if code < 0 else f'exit code {code}'
  last = next((line.strip() for line in reversed(message.splitlines()) if line.strip()), 'nothing')
  return program.failed(
    name, 'crashed', f'{name}: the compiler crashed ({how}); its last words: {last}', message
  )
