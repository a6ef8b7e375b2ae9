import io
import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from memjax import metrics
from memjax.metrics import MetricsWriter, Progress


def write_steps(workdir, steps, resume_step=None):
  with MetricsWriter(workdir, resume_step) as writer:
    for step in steps:
      writer.write(step, {'train/loss': 10 / step})


def tensorboard_scalars(workdir, tag):
  """Steps and values as TensorBoard itself shows them."""
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  accumulator = EventAccumulator(str(workdir))
  accumulator.Reload()
  return {event.step: event.value for event in accumulator.Scalars(tag)}


# ---- the file


def test_lines_are_what_was_written(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {'train/loss': jnp.float32(2.5), 'tokens': 2**40, 'lr': np.float64(0.1)})
    assert metrics.read(tmp_path) == [{'step': 1, 'train/loss': 2.5, 'tokens': 2**40, 'lr': 0.1}]


def test_not_finite_is_null(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {'a': math.nan, 'b': jnp.inf, 'c': -math.inf})

  def refuse(constant):
    raise AssertionError(constant)

  line = (tmp_path / 'metrics.jsonl').read_text()
  assert json.loads(line, parse_constant=refuse) == {'step': 1, 'a': None, 'b': None, 'c': None}


def test_run_kill_resume_leaves_the_lines_of_an_uninterrupted_run(tmp_path):
  for name in 'ab':
    (tmp_path / name).mkdir()
  write_steps(tmp_path / 'a', range(1, 11))
  write_steps(tmp_path / 'b', range(1, 8))
  with open(tmp_path / 'b' / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 8, "train/l')
  assert [row['step'] for row in metrics.read(tmp_path / 'b')] == [*range(1, 8)]
  write_steps(tmp_path / 'b', range(5, 11), resume_step=4)
  lines = [(tmp_path / name / 'metrics.jsonl').read_bytes() for name in 'ab']
  assert lines[0] == lines[1]


def test_fresh_start_empties_the_file(tmp_path):
  write_steps(tmp_path, [1, 2])
  write_steps(tmp_path, [1])
  assert [row['step'] for row in metrics.read(tmp_path)] == [1]


@pytest.mark.parametrize(
  ('line', 'said'),
  [('{"st', 'line 2 is not JSON'), ('[2]', 'line 2 has no step'), ('{}', 'line 2 has no step')],
)
def test_a_bad_line_in_the_middle_is_named(tmp_path, line, said):
  (tmp_path / 'metrics.jsonl').write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
  with pytest.raises(ValueError, match=said):
    metrics.read(tmp_path)


def test_only_the_primary_process_writes(tmp_path):
  with MetricsWriter(tmp_path, primary=False) as writer:
    writer.write(1, {'train/loss': 1.0})
  assert list(tmp_path.iterdir()) == []
  assert metrics.read(tmp_path) == []


ENDLESS_LINES = """
import sys
from memjax.metrics import MetricsWriter
writer = MetricsWriter(sys.argv[1])
for step in range(1, 10**9):
  writer.write(step, {'train/loss': 1.5})
  print(step, flush=True)
"""


def test_a_kill_loses_no_line(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-c', ENDLESS_LINES, str(tmp_path)],
    stdout=subprocess.PIPE,
    env=dict(os.environ, JAX_PLATFORMS='cpu'),
    text=True,
  )
  while int(process.stdout.readline()) < 100:
    pass
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  steps = [row['step'] for row in metrics.read(tmp_path)]
  assert len(steps) >= 100
  assert steps == [*range(1, len(steps) + 1)]


def test_tensorboard_reads_the_scalars_and_forgets_what_was_done_again(tmp_path):
  write_steps(tmp_path, range(1, 8))
  write_steps(tmp_path, [5, 6], resume_step=4)
  found = tensorboard_scalars(tmp_path, 'train/loss')
  assert found == pytest.approx({step: 10 / step for step in range(1, 7)})  # 7 was cut.
  assert 'tensorflow' not in sys.modules


# ---- throughput


class Clock:
  """Seconds that pass when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now

  def wait(self, seconds):
    self.now += seconds


def test_rate_is_of_the_window_without_pauses():
  clock = Clock()
  progress = Progress(100, 0, tokens_per_step=1000, clock=clock, primary=False)
  clock.wait(5.0)
  rate = progress.rate(10)
  assert rate.step_seconds == 0.5
  assert rate.tokens_per_second == 2000
  assert rate.eta_seconds == 45.0
  clock.wait(2.0)
  with progress.pause():
    clock.wait(8.0)
  clock.wait(3.0)
  rate = progress.rate(20)
  assert rate.step_seconds == 0.5
  assert rate.tokens_per_second == 2000
  assert rate.eta_seconds == 80 * 18.0 / 20  # What the user waits for includes evaluations.


def test_a_resumed_run_counts_from_where_it_starts():
  clock = Clock()
  progress = Progress(100, 90, tokens_per_step=8, clock=clock, primary=False)
  clock.wait(4.0)
  assert progress.rate(92) == (4.0, 2.0, 16.0)


def test_no_steps_no_rate():
  progress = Progress(100, 0, tokens_per_step=8, clock=Clock(), primary=False)
  assert all(math.isnan(value) for value in progress.rate(0))


def test_a_failure_inside_a_pause_ends_it():
  clock = Clock()
  progress = Progress(100, 0, tokens_per_step=8, clock=clock, primary=False)

  def fail():
    with progress.pause():
      clock.wait(3.0)
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fail()
  clock.wait(1.0)
  assert progress.rate(1).step_seconds == 1.0


def test_report_prints_one_plain_line_into_a_pipe():
  clock, out = Clock(), io.StringIO()
  with Progress(100, 0, tokens_per_step=1000, clock=clock, file=out) as progress:
    clock.wait(5.0)
    values = progress.report(10, 3.25, learning_rate=1e-3, memory_mib=700.2)
    progress.say('eval loss 3.1')
  assert values == {'throughput/tokens_per_s': 2000.0, 'throughput/step_seconds': 0.5}
  assert out.getvalue() == (
    'step  10/100  loss 3.2500  lr 1.00e-03  2.0k tok/s  500 ms/step  eta 0:00:45  700 MiB\n'
    'eval loss 3.1\n'
  )


def test_a_terminal_gets_a_bar_below_the_lines():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  clock, out = Clock(), Terminal()
  with Progress(100, 0, tokens_per_step=1000, clock=clock, file=out) as progress:
    clock.wait(5.0)
    progress.report(10, 3.25)
  assert 'step  10/100  loss 3.2500' in out.getvalue()
  assert '10%' in out.getvalue()


# ---- memory


class Device:
  def __init__(self, **stats):
    self._stats = stats

  def memory_stats(self):
    return self._stats or None


def test_memory_is_that_of_the_fullest_device():
  devices = [
    Device(bytes_in_use=3 * 2**20, peak_bytes_in_use=9 * 2**20),
    Device(bytes_in_use=5 * 2**20, peak_bytes_in_use=6 * 2**20),
  ]
  assert metrics.live_memory_mib(devices) == {'memory/live_mib': 5.0, 'memory/peak_mib': 9.0}


def test_memory_of_the_process_where_the_backend_does_not_count():
  before = metrics.live_memory_mib([Device()])
  block = np.ones(64 * 2**20, np.uint8)
  after = metrics.live_memory_mib([Device()])
  assert after['memory/live_mib'] - before['memory/live_mib'] == pytest.approx(64, abs=8)
  assert after['memory/peak_mib'] >= after['memory/live_mib']
  del block


# ---- the picture


def test_plot_loss_draws_a_picture(tmp_path):
  assert metrics.plot_loss(tmp_path) is None
  with MetricsWriter(tmp_path) as writer:
    for step in range(1, 50):
      writer.write(step, {'train/loss': math.nan if step == 9 else 5 / step})
    writer.write(49, {'eval/loss': 0.4})
  path = metrics.plot_loss(tmp_path)
  assert path == tmp_path / 'loss.png'
  assert path.read_bytes().startswith(b'\x89PNG')
  assert 'matplotlib.pyplot' not in sys.modules


def test_smoothing_does_not_lag():
  assert metrics._smooth([2.0] * 300) == pytest.approx([2.0] * 300)
  line = np.linspace(5.0, 1.0, 600)
  assert metrics._smooth(list(line))[:590] == pytest.approx(line[:590])
  noisy = line + np.random.default_rng(0).normal(size=600)
  residual = np.asarray(metrics._smooth(list(noisy)) - line)[100:-10]
  assert residual.std() < 0.3  # 21 samples a window: 1 / sqrt(21) = 0.22.
  assert metrics._smooth([1.0]) == [1.0]
