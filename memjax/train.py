"""One training run, from a config to a trained model, in the order in which things happen."""

import dataclasses
import functools
import os
import pathlib
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from memjax import build as build_lib
from memjax import checkpoint, metrics, plan, sharding, workdir
from memjax import config as config_lib
from memjax.evaluate import evaluate, place
from memjax.preemption import Preemption


def train(config: ConfigDict, directory: str, *, devices=None) -> dict:
  """Trains until `config.steps` updates are finished, resuming what the work directory holds.

  A killed and resumed run gives the same bits as one that was left alone: parameters, optimizer state and metrics lines.
  SIGTERM saves after the step under way and returns.

  Leaves in `directory`: `config.json`, `data.json`, `memory.json`, `metrics.jsonl` and TensorBoard events, `checkpoints/`,
  and at the end `loss.png` and `sample.txt`.

  Args:
    config: See `memjax.config.default`.
    directory: Work directory of this run; created if missing.
    devices: Devices of the mesh; default all.

  Returns:
    The last metrics line: name -> value.

  Raises:
    ValueError: for a config, mesh, data source or work directory that cannot work, before anything is allocated.
    FloatingPointError: when the loss is not finite, naming the step.
  """
  with Preemption() as preemption:
    # What is asked for. Shapes only; nothing is allocated before the receipt is printed.
    config_lib.validate(config)
    use_cpu_devices(config.cpu_devices)
    say = Console(quiet=jax.process_index() > 0, highlight=False, soft_wrap=True).print
    mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=devices)
    parts = build_lib.build(config, mesh)
    directory = pathlib.Path(directory)
    for notice in workdir.prepare(directory, config):
      say(f'Resuming with another {notice}')
    say(describe(config, parts, mesh))
    dataset = load_data(config, parts.model.vocab)
    workdir.record_data(directory, dataset)
    say(banner(dataset))

    # The compiled step, and what it needs.
    started = time.monotonic()
    step = parts.step.lower(parts.state, parts.batch).compile()
    shardings = jax.tree.map(lambda x: x.sharding, (parts.state, parts.batch))
    plan.check_donated(step, parts.state, shardings[0])
    receipt = plan.measure(parts.state, shardings[0], parts.batch, shardings[1], step)
    receipt['compile_seconds'] = round(time.monotonic() - started, 2)
    workdir.write_json(directory / 'memory.json', receipt)
    say(plan.table(receipt, 'Memory of one training step'))

    # A fresh state, or the newest sound checkpoint.
    intervals = {k: v or None for k, v in config.checkpoint.to_dict().items()}
    checkpoints = checkpoint.Checkpoints(directory / 'checkpoints', **intervals)
    restored = checkpoints.restore(parts.state)
    if restored is None:
      state, first = parts.init(build_lib.root_key(config, 'params')), 0
    else:
      state, first = restored.state, restored.step
      say(f'Resuming after step {first:,}')
    del restored

    writer = metrics.MetricsWriter(directory, first, primary=jax.process_index() == 0)
    progress = metrics.Progress(config.steps, first, config.batch_size * config.seq_len)
    evaluated = {line['step'] for line in metrics.read(directory) if 'eval/loss' in line}
    preemption.defer()

    def evaluate_if_due(finished):
      last = finished == config.steps
      if not config.eval_every or not finished or not (last or finished % config.eval_every == 0):
        return
      if finished in evaluated:
        return
      with progress.pause():
        values = evaluate(
          parts.eval_step,
          state['params'],
          dataset.validation,
          parts.eval_batch,
          max_tokens=config.eval_tokens,
          stop=lambda: preemption.received,
        )
      if values is not None:
        writer.write(finished, values)
        progress.say(finished, values)

    evaluate_if_due(first)  # What a run that was stopped in its evaluation left to do.
    for finished in range(first + 1, config.steps + 1):
      rows = functools.partial(dataset.train.rows, finished - 1, config.batch_size, seed=config.seed)
      state, values = step(state, place(rows, parts.batch))
      if finished % config.log_every == 0 or finished == config.steps:
        log(writer, progress, finished, values, parts.schedule)
      evaluate_if_due(finished)
      stop = preemption.requested(finished)
      with progress.pause():
        checkpoints.maybe_save(state, finished, {}, force=stop or finished == config.steps)
      if stop:
        say(f'Stopping after step {finished:,}, as asked; the same command resumes')
        break


def describe(config: ConfigDict, parts: build_lib.Parts, mesh) -> str:
  """Returns one line on what is trained, and on what."""
  axes = ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
  return (
    f'{config.model}: {parts.model.num_params() / 1e6:,.1f} M parameters in {config.param_dtype}, '
    f'{config.optimizer.name}, {config.steps:,} steps of {config.batch_size} x {config.seq_len} '
    f'tokens, mesh {axes} of {mesh.devices.flat[0].device_kind}'
  )


def banner(dataset) -> str:
  """Returns what the run is trained on, and what it would rather have had."""
  lines = [f'[bold yellow]Missing data:[/] {sentence}' for sentence in dataset.missing]
  if lines:
    lines.append(f'[bold yellow]Training on {dataset.source!r} instead; data.json records it.[/]')
  train, validation = dataset.train.num_tokens, dataset.validation.num_tokens
  lines.append(
    f'Data {dataset.source}: {train:,} tokens to train on, {validation:,} to validate on, '
    f'vocabulary {dataset.tokenizer.vocab_size:,}'
  )
  return '\n'.join(lines)


def load_data(config: ConfigDict, vocab_size: int):
  """Returns the dataset of a config; see `memjax.data.load`."""
  from memjax import data  # Libraries for text are loaded by those who train on it.

  default_cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'memjax'
  return data.load(
    config.data.sources,
    config.data.tokenizer,
    config.seq_len,
    vocab_size=vocab_size,
    cache_dir=config.data.cache_dir or default_cache,
    seed=config.seed,
    validation_fraction=config.data.validation_fraction,
    max_tokens=config.data.max_tokens or None,
  )


def use_cpu_devices(count: int) -> None:
  """Splits a CPU into `count` devices, if JAX has not started and the environment does not say so already."""
  if count and 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_num_cpu_devices', count)
