"""The same run in two processes of two CPU devices each, against one process of four."""

import signal
import socket

import launch
import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS = 8
FLAGS = (
  f'--config.steps={STEPS}',
  '--config.mesh.data=2',
  '--config.mesh.fsdp=2',
  '--config.eval_every=4',
  '--config.checkpoint.every=4',
  '--config.checkpoint.keep=9',
  '--config.optimizer.refresh_every=3',
)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return launch.once(tmp_path_factory, 'cache', lambda directory: None)


def run_two(workdir, cache, moments=('never', 'never'), **environment):
  """Runs both processes to their end and returns them."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  flags = (*FLAGS, '--config.cpu_devices=2', f'--coordinator=localhost:{port}', '--processes=2')
  processes = [
    launch.start(
      workdir,
      *flags,
      f'--process={i}',
      moment=moment,
      send=signal.SIGTERM,
      cache=cache,
      ROWS=str(workdir.parent / f'rows_{i}'),
      **environment,
    )
    for i, moment in enumerate(moments)
  ]
  try:
    return [launch.finish(process) for process in processes]
  finally:
    for process in processes:
      process.kill()


@pytest.fixture(scope='module')
def two(cache, tmp_path_factory):
  """Two processes that nothing happens to."""

  def make(directory):
    for i, done in enumerate(run_two(directory / 'run', cache)):
      assert done.returncode == 0, done.stderr
      (directory / f'out_{i}').write_text(done.stdout)

  return launch.once(tmp_path_factory, 'two', make)


def test_two_processes_have_the_losses_of_one_with_as_many_devices(two, cache, tmp_path):
  one = launch.run(tmp_path, *FLAGS, '--config.cpu_devices=4', cache=cache)
  assert one.returncode == 0, one.stderr
  for kind in ('train/loss', 'eval/loss'):
    expected, found = launch.losses(tmp_path, kind), launch.losses(two / 'run', kind)
    assert found.keys() == expected.keys()
    # Sums over devices come in another order: f32 rounding.
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_each_process_reads_only_its_rows(two):
  rows = [set((two / f'rows_{i}').read_text().split()) for i in range(2)]
  assert rows == [{'0:2', '2:4'}, {'4:6', '6:8'}]


def test_only_process_0_writes_and_prints(two):
  # Gloo's threads print too, through one another's lines.
  ours = ('parameters', 'Memory of one training step', 'Data ', 'step')
  printed = [(two / name).read_text() for name in ('out_0', 'out_1')]
  assert [[words in text for words in ours] for text in printed] == [[True] * 4, [False] * 4]
  assert len(list((two / 'run').glob('events.*'))) == 1
  steps = [row['step'] for row in launch.lines(two / 'run') if 'train/loss' in row]
  assert steps == list(range(1, STEPS + 1))


def test_sigterm_to_one_process_stops_both_at_the_same_step_and_both_resume(two, cache, tmp_path):
  workdir = tmp_path / 'run'
  # Slow steps: JAX looks for the signal once a second.
  stopped = run_two(workdir, cache, moments=('never', 'step=2'), SECONDS_A_STEP='0.5')
  assert [done.returncode for done in stopped] == [0, 0], stopped[0].stderr + stopped[1].stderr
  step = launch.checkpoints(workdir)[-1]
  assert 2 < step < STEPS
  assert launch.lines(workdir)[-1]['step'] == step
  assert f'stopped after step {step}' in stopped[0].stdout
  resumed = run_two(workdir, cache)
  assert [done.returncode for done in resumed] == [0, 0], resumed[0].stderr + resumed[1].stderr
  assert f'Resuming after step {step}' in resumed[0].stdout
  assert launch.lines(workdir) == launch.lines(two / 'run')
  assert launch.digests(workdir, STEPS) == launch.digests(two / 'run', STEPS)
