"""Children that compile: what comes back from them, and from those that die."""

import sys
import time

import jax
import jax.numpy as jnp
import pytest

from memjax import config
from memjax.plan import compiler, exported, targets


def job(target='v5e:1x1'):
  return compiler.config_job(config.default(), target)


def become(monkeypatch, code):
  """Children run `code` instead of the worker."""
  monkeypatch.setattr(compiler, 'CHILD', [sys.executable, '-c', f'import sys, os, time; {code}'])
  monkeypatch.setattr('memjax.plan.targets.check_installed', lambda target: None)


def test_reports_come_in_order_and_are_cached(tmp_path):
  pytest.importorskip('libtpu')
  x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
  square = jax.jit(lambda x: x @ x)
  small = exported.export_job(square, (x,), targets.parse('v5e:1x1'), tmp_path / 'step')
  seen = []
  jobs = [small, job('v5e:1x'), job('v5e:3x3')]
  reports = compiler.compile_jobs(jobs, cache_dir=tmp_path, on_done=lambda *x: seen.append(x))
  assert [report['target'] for report in reports] == ['v5e:1x1', 'v5e:1x', 'v5e:3x3']
  assert sorted(index for index, _ in seen) == [0, 1, 2]
  assert [report['kind'] for report in reports] == [None, 'target', 'refused']
  done = reports[0]
  assert done['fits']
  assert done['collectives'] == {}
  assert done['compiled']['argument'] == 2**18
  assert done['peak_bytes'] > 2**19  # The result is another 256 KiB.
  (again,) = compiler.compile_jobs([small], cache_dir=tmp_path)
  assert again == done | {'cached': True}


@pytest.mark.parametrize(
  ('code', 'kind', 'words'),
  [
    (
      "sys.stderr.write('mosaic!'); sys.stderr.flush(); os.kill(os.getpid(), 9)",
      'killed',
      'memory',
    ),
    ("sys.stderr.write('mosaic!'); sys.stderr.flush(); os.abort()", 'crashed', 'signal 6'),
    ("sys.exit('mosaic!')", 'crashed', 'exit code 1); its last words: mosaic!'),
    ("print('no report'); sys.stderr.write('mosaic!')", 'crashed', 'exit code 0'),
  ],
)
def test_a_child_that_dies_is_a_report(monkeypatch, code, kind, words):
  become(monkeypatch, code)
  (report,) = compiler.compile_jobs([job()], cache_dir='')
  assert report['kind'] == kind
  assert report['fits'] is None
  assert report['error'].startswith('v5e:1x1: ')
  assert words in report['error']
  assert 'mosaic!' in report['message']


def test_a_child_that_takes_too_long_is_stopped(monkeypatch):
  become(monkeypatch, 'time.sleep(60)')
  started = time.monotonic()
  (report,) = compiler.compile_jobs([job()], cache_dir='', timeout=0.5)
  assert report['kind'] == 'timeout'
  assert time.monotonic() - started < 30


def test_at_most_two_compile_at_a_time(monkeypatch, tmp_path):
  """Each child counts those that run beside it, and answers with their number."""
  become(
    monkeypatch,
    f"d = {str(tmp_path)!r}; me = os.path.join(d, str(os.getpid())); open(me, 'w').close(); "
    'time.sleep(0.3); print(len(os.listdir(d))); os.remove(me)',
  )
  counts = compiler.compile_jobs([job()] * 5, cache_dir='')
  assert max(counts) == 2


def test_an_interrupt_leaves_no_child(monkeypatch, tmp_path):
  become(
    monkeypatch,
    f"os.chdir({str(tmp_path)!r}); open(str(os.getpid()), 'w').close(); "
    'time.sleep(0 if len(os.listdir()) < 2 else 60); print(0)',
  )

  def stop(index, report):
    raise KeyboardInterrupt

  started = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    compiler.compile_jobs([job()] * 3, cache_dir='', on_done=stop)
  assert time.monotonic() - started < 30
