"""Metrics of a run: a file of JSON lines, TensorBoard events, a picture, and a line for the human.

`metrics.jsonl` in the work directory is the record: one object a line, such as
`{"step": 10, "train/loss": 3.2}`, where `step` counts finished updates. A number that is not finite
is written as `null`, because JSON has no word for it; TensorBoard gets it as it is. Everything else
here is made from, or beside, that file.
"""

import contextlib
import json
import math
import os
import pathlib
import resource
import socket
import sys
import time
from typing import NamedTuple

import jax

LINES = 'metrics.jsonl'
MIB = 2**20


class MetricsWriter:
  """Appends metrics to `metrics.jsonl` and TensorBoard events in the work directory.

  Each line is one write to the operating system, so that a kill loses no earlier line. When a run
  resumes, lines of the steps it will do again are cut: run, kill and resume leave the lines of an
  uninterrupted run.

  Args:
    workdir: An existing local directory.
    resume_step: Finished updates of the checkpoint that the run resumes from; lines after it are
      cut. `None` is a fresh start, which empties the file.
    primary: Whether this process writes; give `jax.process_index() == 0`.
  """

  def __init__(self, workdir, resume_step=None, primary=True):
    self._lines = self._events = None
    if not primary:
      return
    path = pathlib.Path(workdir) / LINES
    _cut(path, -1 if resume_step is None else resume_step)
    self._lines = open(path, 'ab', buffering=0)  # noqa: SIM115 (closed by `close`)
    self._events = _EventFile(workdir, purge_after=resume_step)

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def write(self, step, values):
    """Writes one line and the same scalars as TensorBoard events.

    Args:
      step: Finished updates.
      values: `{name: number}`; scalar arrays are waited for.
    """
    if self._lines is None:
      return
    values = {name: _plain(value) for name, value in values.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    self._lines.write((json.dumps({'step': int(step), **finite}) + '\n').encode())
    self._events.write(int(step), values)

  def close(self):
    """Closes the files; every line is on disk already."""
    for file in (self._lines, self._events):
      if file is not None:
        file.close()
    self._lines = self._events = None


def read(workdir):
  """Reads `metrics.jsonl` as a list of dicts, oldest first; `[]` without one.

  A last line without its end, as a kill leaves it, is dropped.

  Raises:
    ValueError: naming a line that is no object with a step.
  """
  path = pathlib.Path(workdir) / LINES
  if not path.exists():
    return []
  *lines, _ = path.read_bytes().split(b'\n')
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError as error:
      raise ValueError(f'{path}, line {number} is not JSON ({error}); remove that line') from error
    if not isinstance(row, dict) or not isinstance(row.get('step'), int):
      raise ValueError(f'{path}, line {number} has no step; remove that line')
    rows.append(row)
  return rows


def _cut(path, last_step):
  """Atomically drops the lines after `last_step`, and a torn last line."""
  if not path.exists():
    return
  kept = [row for row in read(path.parent) if row['step'] <= last_step]
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(json.dumps(row) + '\n' for row in kept))
  os.replace(temporary, path)


def _plain(value):
  """A Python number from a number or a scalar array."""
  value = value.item() if hasattr(value, 'item') else value
  return value if isinstance(value, int) else float(value)


class _EventFile:
  """TensorBoard's event file, written without TensorFlow.

  `tensorboard.summary.writer.EventFileWriter` would do, were it not for the thread that it writes
  from and for TensorFlow, which it imports where it finds it.
  """

  def __init__(self, workdir, purge_after):
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    seconds, nanoseconds = divmod(
      time.time_ns(), 10**9
    )  # Readers take files in the order of names.
    host = f'{socket.gethostname()}.{os.getpid()}'
    name = f'events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{host}'
    self._writer = RecordWriter(open(pathlib.Path(workdir) / name, 'xb'))  # noqa: SIM115
    self._write(file_version='brain.Event:2')
    # Readers forget the steps from here on that an earlier file of this directory holds.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(session_log=start, step=0 if purge_after is None else purge_after + 1)

  def write(self, step, values):
    scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._write(step=step, summary=self._summary(value=scalars))

  def _write(self, **fields):
    self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
    self._writer.flush()

  def close(self):
    self._writer.close()


class Rate(NamedTuple):
  """Speed of a run, as `Progress.rate` measures it."""

  tokens_per_second: float  # Over the steps since the last call, without pauses.
  step_seconds: float  # The same.
  eta_seconds: float  # Until the last step, at the pace of the run so far, pauses included.


class Progress:
  """Measures throughput and prints a line for each logged step; a context manager.

  Time inside `with progress.pause():` (evaluation, checkpoints) does not count as training. On a
  terminal a bar with the remaining time stays below the lines.

  Args:
    total_steps: Updates of the whole run.
    start_step: Finished updates at the start; those of the checkpoint when resumed.
    tokens_per_step: Tokens of one update, over all devices.
    clock: Function that returns seconds.
    file: Where to print; standard output if `None`.
    primary: Whether this process prints; every process measures.
  """

  def __init__(
    self,
    total_steps,
    start_step=0,
    tokens_per_step=0,
    *,
    clock=time.monotonic,
    file=None,
    primary=True,
  ):
    self._total = total_steps
    self._tokens = tokens_per_step
    self._clock = clock
    self._first = self._last = start_step  # Step at the start, and at the last report.
    self._first_time = self._last_time = clock()
    self._paused = 0.0  # Seconds since the last report.
    self._display = _display(total_steps, start_step, file or sys.stdout) if primary else None

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  @contextlib.contextmanager
  def pause(self):
    """Leaves what happens inside out of the throughput."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - start

  def rate(self, step):
    """The `Rate` at `step` finished updates; starts the next window."""
    now = self._clock()
    steps = step - self._last
    seconds = now - self._last_time - self._paused
    step_seconds = seconds / steps if steps > 0 else math.nan
    speed = self._tokens / step_seconds if step_seconds > 0 else math.nan
    done = step - self._first
    eta = (self._total - step) * (now - self._first_time) / done if done > 0 else math.nan
    self._last, self._last_time, self._paused = step, now, 0.0
    return Rate(speed, step_seconds, eta)

  def report(self, step, loss, learning_rate=None, memory_mib=None):
    """Prints a line about `step` and returns its rate as metrics.

    Returns:
      `{'throughput/tokens_per_s': ..., 'throughput/step_seconds': ...}`.
    """
    rate = self.rate(step)
    if self._display:
      line = format_line(step, self._total, loss, rate, learning_rate, memory_mib)
      self._display.show(step, line)
    return {
      'throughput/tokens_per_s': rate.tokens_per_second,
      'throughput/step_seconds': rate.step_seconds,
    }

  def say(self, message):
    """Prints a line of any other kind, such as an evaluation, above the bar."""
    if self._display:
      self._display.show(None, message)

  def close(self):
    """Takes the bar away."""
    if self._display:
      self._display.close()


def format_line(step, total_steps, loss, rate, learning_rate=None, memory_mib=None):
  """One line for the human.

  >>> format_line(20, 1000, 3.14159, Rate(51234.0, 0.16, 3725.0), 1e-3, 812.4)
  'step   20/1000  loss 3.1416  lr 1.00e-03  51.2k tok/s  160 ms/step  eta 1:02:05  812 MiB'
  """
  parts = [f'step {step:>{len(str(total_steps))}}/{total_steps}', f'loss {loss:.4f}']
  if learning_rate is not None:
    parts.append(f'lr {learning_rate:.2e}')
  if math.isfinite(rate.step_seconds):
    ms = rate.step_seconds * 1000
    parts.append(f'{_short(rate.tokens_per_second)} tok/s')
    parts.append(f'{ms:.0f} ms/step' if ms < 10_000 else f'{rate.step_seconds:.1f} s/step')
  if math.isfinite(rate.eta_seconds):
    parts.append(f'eta {format_seconds(rate.eta_seconds)}')
  if memory_mib is not None:
    parts.append(f'{memory_mib:.0f} MiB')
  return '  '.join(parts)


def format_seconds(seconds):
  """Hours, minutes and seconds.

  >>> format_seconds(3725.4), format_seconds(100 * 3600)
  ('1:02:05', '100:00:00')
  """
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'


def _short(number):
  for divisor, unit in ((1e6, 'M'), (1e3, 'k')):
    if number >= divisor:
      return f'{number / divisor:.1f}{unit}'
  return f'{number:.0f}'


def _display(total_steps, start_step, file):
  """A bar on a terminal, plain lines anywhere else."""
  if file.isatty():
    return _Bar(total_steps, start_step, file)
  return _Lines(file)


class _Lines:
  """Prints lines, at once even into a pipe."""

  def __init__(self, file):
    self._file = file

  def show(self, step, line):
    del step
    print(line, file=self._file, flush=True)

  def close(self):
    pass


class _Bar:
  """Prints lines above a bar."""

  def __init__(self, total_steps, start_step, file):
    from rich import console, progress

    self._progress = progress.Progress(
      progress.TextColumn('training'),
      progress.BarColumn(bar_width=None),
      progress.MofNCompleteColumn(),
      progress.TextColumn('{task.percentage:>3.0f}%'),
      progress.TimeElapsedColumn(),
      console=console.Console(file=file),
    )
    self._task = self._progress.add_task('training', total=total_steps, completed=start_step)
    self._progress.start()

  def show(self, step, line):
    self._progress.console.print(line, highlight=False, markup=False)
    if step is not None:
      self._progress.update(self._task, completed=step)

  def close(self):
    self._progress.stop()


def live_memory_mib(devices=None):
  """Memory in use now and at its peak, in MiB.

  Of the fullest of the devices where their backend counts (TPU, GPU); else, on CPU, of this
  process.

  Args:
    devices: Local devices; all of them if `None`.

  Returns:
    `{'memory/live_mib': float, 'memory/peak_mib': float}`.
  """
  stats = [device.memory_stats() for device in devices or jax.local_devices()]
  stats = [s for s in stats if s and 'bytes_in_use' in s]
  if stats:
    live = max(s['bytes_in_use'] for s in stats)
    peak = max(s.get('peak_bytes_in_use', s['bytes_in_use']) for s in stats)
  else:
    live, peak = _process_bytes()
  return {'memory/live_mib': live / MIB, 'memory/peak_mib': peak / MIB}


def _process_bytes():
  """Resident set of this process, now and at its peak."""
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  statm = pathlib.Path('/proc/self/statm')
  if not statm.exists():
    return peak, peak
  live = int(statm.read_text().split()[1]) * resource.getpagesize()
  return live, max(live, peak)


def plot_loss(workdir):
  """Draws `loss.png` from `metrics.jsonl`: the training loss, raw and smoothed, and the evaluation
  losses.

  Reads `train/loss`, `eval/loss` and `throughput/tokens_per_s`.

  Returns:
    The picture's path, or `None` if there is no loss to draw.
  """
  from matplotlib import ticker
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = read(workdir)
  train, evals = _series(rows, 'train/loss'), _series(rows, 'eval/loss')
  if not train[0] and not evals[0]:
    return None
  figure = Figure(figsize=(8, 4.5), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.add_subplot()
  if train[0]:
    smooth = _smooth(train[1])
    axes.plot(*train, color='#4c78a8', alpha=0.3, linewidth=1)
    axes.plot(train[0], smooth, color='#4c78a8', linewidth=2, label=f'train  {smooth[-1]:.3f}')
  if evals[0]:
    style = dict(color='#e45756', marker='o', markersize=5, linewidth=1, linestyle='--')
    axes.plot(*evals, **style, label=f'eval  {evals[1][-1]:.3f}')
  axes.set_xlabel('finished updates')
  axes.set_ylabel('loss (nats a token)')
  axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
  axes.xaxis.set_major_formatter('{x:,.0f}')
  losses = train[1] + evals[1]
  if max(losses) > 2 * min(losses) > 0:  # Else the first steps take all the room.
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(ticker.MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.grid(color='#dddddd', linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  axes.set_title(_title(workdir, rows), loc='left', fontsize=11)
  path = pathlib.Path(workdir) / 'loss.png'
  figure.savefig(path, dpi=150)
  return path


def _series(rows, name):
  """Steps and values of the rows that have a finite `name`."""
  found = [(row['step'], row[name]) for row in rows if row.get(name) is not None]
  return [step for step, _ in found], [value for _, value in found]


def _smooth(values):
  """Centred mean over a thirtieth of the run; over less near the start, where loss falls fast."""
  smooth = []
  for i in range(len(values)):
    half = min(i // 5, len(values) // 60)
    window = values[i - half : i + half + 1]
    smooth.append(sum(window) / len(window))
  return smooth


def _title(workdir, rows):
  name = pathlib.Path(workdir).resolve().name
  speeds = sorted(_series(rows, 'throughput/tokens_per_s')[1])
  return f'{name}: {_short(speeds[len(speeds) // 2])} tokens/s' if speeds else name
