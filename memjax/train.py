"""One training run, from a config to a trained model, in the order in which things happen.

On a first reading, read `train` and skip the rest: it is what the run says and writes.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape

from memjax import build as build_lib
from memjax import (
  checkpoint,
  estimators,
  metrics,
  peft_folder,
  plan,
  pretrained,
  same_run,
  sharding,
  workdir,
)
from memjax import config as config_lib
from memjax.evaluate import evaluate, place
from memjax.models.decode import decode
from memjax.preemption import Preemption
from memjax.steps import selectors

SKIPS = 100  # Steps in a row without a finite loss, where a step skips them, that end a run.


def train(config: ConfigDict, directory, *, devices=None) -> dict:
  """Trains until `config.steps` updates are finished, resuming what the work directory holds.

  A killed and resumed run gives the same bits as one that was left alone: parameters, optimizer
  state and metrics lines. SIGTERM saves after the step under way and returns; so does the first
  Ctrl-C, which is raised at the end, and a second one interrupts at once.

  Leaves in `directory`: `config.json`, `data.json`, `memory.json`, `metrics.jsonl` and TensorBoard
  events, `checkpoints/`, with `optimizer.log_steps` the `log.npz` that `memjax.replay_run` reads,
  at the end `loss.png` and `sample.txt`, with `config.export` a folder `model-STEP` that
  `transformers` and `memjax.models.load` read, and with `config.adapter.export` a folder
  `adapter-STEP` that `peft` reads.

  Args:
    config: See `memjax.config.default`.
    directory: Work directory of this run; created if missing. All hosts of a run share it.
    devices: Devices of the mesh; default all.

  Returns:
    `step`, `state` (the training state) and `eval/loss` if it was evaluated.

  Raises:
    ValueError: for a config, mesh, data source or work directory that cannot work, before anything
      is allocated.
    FloatingPointError: when a loss or gradient is not finite, naming the step.
  """
  directory = workdir.local(directory)
  with Preemption() as preemption, contextlib.ExitStack() as held:
    # ---- What is asked for, as shapes.
    config_lib.validate(config)
    use_cpu_devices(config.cpu_devices)
    config = peft_folder.resolved(config, directory)
    mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=devices)
    parts = build_lib.build(config, mesh)
    primary = jax.process_index() == 0
    say = Console(quiet=not primary, highlight=False, soft_wrap=True).print
    say(describe(config, parts, mesh))
    if config.adapter.get('load'):
      say(peft_folder.describe(config))
    held.enter_context(workdir.lock(directory))
    notices = workdir.prepare(directory, config)
    dataset = load_data(config, parts.model)
    selectors.check_sources(config, getattr(dataset.train, 'sources', ()))
    for notice in notices:
      say(f'[yellow]Resuming with another {escape(notice)}[/]')
    say(banner(dataset))

    # ---- The compiled step, and the memory it needs. Only a run that fits claims the directory:
    # what makes another fit is another config.
    step, receipt = plan.compile_here(config, parts)
    say(plan.table([receipt], 'Memory of one training step'))
    plan.check_fits(config, receipt, mesh.devices.flat, say)
    workdir.record(directory, config, dataset)
    workdir.write_json(directory / 'memory.json', receipt)

    # ---- A fresh state, or the newest sound checkpoint; nothing was allocated before.
    intervals = {k: v or None for k, v in config.checkpoint.to_dict().items()}
    checkpoints = checkpoint.Checkpoints(directory / 'checkpoints', **intervals)
    made = config.to_dict()  # Goes with every checkpoint, which may lose its work directory.
    restored = checkpoints.restore(parts.state)
    if restored is None:
      state, first = parts.init(build_lib.root_key(config, 'params')), 0
    else:
      same_run.check(restored.metadata.get('config', made), made)
      state, first = restored.state, restored.step
      done = first >= config.steps
      say(f'{"Finished already" if done else "Resuming"} after step {first} of {config.steps}')
    del restored  # The step donates the state; nothing else may hold it.

    writer = metrics.MetricsWriter(directory, first, primary=primary)
    tokens = config.batch_size * config.seq_len
    progress = metrics.Progress(config.steps, first, tokens, primary=primary)

    def rows(finished, start, stop):  # Of the batch after so many finished updates.
      found = dataset.train.rows(finished, config.batch_size, start, stop, config.seed)
      return {'source': np.zeros(stop - start, np.int32)} | found  # Text has one source.

    validate = validator(config, parts, dataset, stop=preemption.requested)
    evaluated = read_evaluation(directory, first)

    def evaluate_if_due(finished, state):
      every = config.eval_every
      due = every and finished and (finished % every == 0 or finished == config.steps)
      if not due or finished in evaluated:
        return
      with progress.pause():
        values = validate(state['params'])
      if values is not None:  # Else given up to stop in time: the resumed run begins with it.
        evaluated[finished] = values
        writer.write(finished, values)
        progress.say(f'step {finished}  {describe_evaluation(values)}')

    def settled(finished, state):
      """The state as it is, or as those who read its parameters now must have it."""
      every = (config.eval_every, config.checkpoint.every)
      read = any(interval and finished % interval == 0 for interval in every)
      if not read and finished < config.steps:
        return state
      with progress.pause():
        return parts.flush(state)

    def save(finished, state, values, force):
      if force or finished % config.checkpoint.every == 0:
        check_finite(finished, values)  # So that what is saved can be resumed.
      with progress.pause():
        saved = checkpoints.maybe_save(state, finished, {'config': made}, force=force)
      if saved and primary and config.optimizer.get('log_steps'):
        estimators.save_log(directory / 'log.npz', estimators.find_log(state['opt']))

    # ---- The loop.
    preemption.defer()
    finished, values = first, {}
    with checkpoints, writer, progress:
      evaluate_if_due(finished, state)
      while finished < config.steps and not preemption.requested():
        batch = place(functools.partial(rows, finished), parts.batch)
        state, values = step(state, batch)
        finished += 1
        if finished % config.log_every == 0 or finished == config.steps:
          log(finished, values, parts.schedule, writer, progress)
        state = settled(finished, state)
        evaluate_if_due(finished, state)
        save(finished, state, values, force=finished == config.steps)
      if finished < config.steps:
        state = parts.flush(state)
        save(finished, state, values, force=True)
        progress.say(f'stopped after step {finished}, as asked; the same command resumes')

    # ---- What is left for people to look at.
    if primary:
      metrics.plot_loss(directory)
    if finished == config.steps and config.export:
      params = parts.view(state['params'])
      say(f'Wrote {pretrained.export(config, parts.model, params, directory, finished)}')
    if finished == config.steps and config.adapter.get('export'):
      params = parts.view(state['params'])
      say(f'Wrote {peft_folder.export(config, parts.model, params, directory, finished)}')
    if finished == config.steps and config.sample.tokens and not config.task.name:
      params = parts.view(state['params'])
      text = sample(config, parts.model, params, dataset.tokenizer)
      say(escape(text))
      if primary:
        (directory / 'sample.txt').write_text(text + '\n')
    return {'step': finished, 'state': state, **evaluated.get(finished, {})}


def validator(config: ConfigDict, parts: build_lib.Parts, dataset, stop):
  """Returns `validate(params) -> values`: the loss and, of a task, its scores; None when `stop`
  asked for it.
  """
  batch = parts.eval_batch
  arguments = dict(split=dataset.validation, batch=batch, max_tokens=config.eval_tokens, stop=stop)
  loss = functools.partial(evaluate, parts.eval_step, **arguments)
  if not config.task.name:
    return lambda params: loss(params=params)
  from memjax import tasks

  def validate(params):
    values = loss(params=params)
    size = batch['tokens'].shape[0]
    split = dataset.validation
    measured = tasks.measure(parts.model, parts.view(params), dataset.task, split, size, stop=stop)
    if values is None or measured is None:
      return None
    return values | {f'eval/{name}': value for name, value in measured.items()}

  return validate


def read_evaluation(directory: pathlib.Path, step: int) -> dict[int, dict]:
  """Returns `{step: line}` if the evaluation after `step` is in the metrics, else `{}`.

  Process 0 writes the metrics, so its answer is everybody's: all must evaluate, or none.
  """
  lines = metrics.read(directory) if jax.process_index() == 0 else []
  found = [line for line in lines if line['step'] == step and 'eval/loss' in line]
  if not multihost_utils.broadcast_one_to_all(bool(found)):
    return {}
  return {step: found[0] if found else {}}


def log(finished: int, values: dict, schedule, writer, progress) -> None:
  """Writes one line of metrics; waits for the step."""
  check_finite(finished, values)
  values = {name: float(value) for name, value in jax.device_get(values).items()}
  values['train/learning_rate'] = float(schedule(finished - 1))
  memory = metrics.live_memory_mib()
  speed = progress.report(
    finished, values['train/loss'], values['train/learning_rate'], memory['memory/live_mib']
  )
  writer.write(finished, values | speed | memory)


def check_finite(finished: int, values: dict) -> None:
  """Raises a `FloatingPointError` unless the step's loss and gradient are finite; waits for it.

  A step that was skipped for that, and counted, has harmed nothing; `SKIPS` in a row have no end.
  """
  values = jax.device_get(values)
  if 0 < values.get('zo/skipped_in_a_row', 0) < SKIPS:
    return
  for name, value in values.items():
    if not np.isfinite(value):
      raise FloatingPointError(
        f'{name} is {value} after step {finished}; the checkpoints before it are sound. Try a '
        'lower optimizer.learning_rate, a clip_norm of 1.0, or a longer warm-up'
      )


def sample(config: ConfigDict, model, params, tokenizer) -> str:
  """Returns the prompt of the config, continued by the model."""
  prompt = tokenizer.encode(config.sample.prompt) or [tokenizer.eos_id]
  room = getattr(model, 'positions', np.inf) - len(prompt)
  tokens = decode(
    dataclasses.replace(model, activations=None),  # One sequence does not divide over a mesh.
    params,
    jnp.asarray([prompt]),
    max(0, min(config.sample.tokens, room)),
    build_lib.root_key(config, 'sample'),
    config.sample.temperature,
  )
  return tokenizer.decode(prompt + np.asarray(tokens)[0].tolist())


def describe(config: ConfigDict, parts: build_lib.Parts, mesh) -> str:
  """Returns one line on what is trained, and on what."""
  axes = ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
  return (
    f'{config.load or config.model}: {parts.model.num_params() / 1e6:,.1f} M parameters in '
    f'{config.param_dtype}, {config.optimizer.name}, {config.steps:,} steps of '
    f'{config.batch_size} x {config.seq_len} tokens, mesh {axes} of '
    f'{mesh.devices.flat[0].device_kind}'
  )


def banner(dataset) -> str:
  """Returns what the run is trained on, and what it would rather have had."""
  lines = [f'[bold yellow]Missing data:[/] {escape(sentence)}' for sentence in dataset.missing]
  if lines:
    lines.append(f'[bold yellow]Training on {escape(dataset.source)} instead[/]; see data.json')
  train, validation, unit = dataset.counts()
  lines.append(
    f'Data {escape(dataset.source)}: {train:,} {unit} to train on, {validation:,} to validate on, '
    f'vocabulary {dataset.tokenizer.vocab_size:,}'
  )
  return '\n'.join(lines)


def describe_evaluation(values: dict) -> str:
  """Returns the validation loss and the scores of a line of metrics."""
  scores = [k for k in values if k not in ('step', 'eval/loss', 'eval/perplexity', 'eval/tokens')]
  said = [f'{name.partition("/")[2]} {values[name]:.4f}' for name in scores]
  return ', '.join([f'validation loss {values["eval/loss"]:.4f}', *said])


def load_data(config: ConfigDict, model):
  """Returns the dataset of a config; see `memjax.data.load` and `memjax.tasks.load`."""
  from memjax import data  # Libraries for text are loaded by those who train on it.

  cache = config.data.cache_dir or config_lib.user_cache()
  tokenizer = pretrained.tokenizer(config)
  if config.task.name:
    from memjax import tasks

    arguments = dict(vocab_size=model.vocab, cache_dir=cache)
    loaded = tasks.load(config.task, model, tokenizer, config.seq_len, **arguments)
  else:
    loaded = data.load(
      config.data.sources,
      tokenizer,
      config.seq_len,
      vocab_size=model.vocab,
      cache_dir=cache,
      seed=config.seed,
      validation_fraction=config.data.validation_fraction,
      max_tokens=config.data.max_tokens or None,
    )
  pretrained.check_tokenizer(config, loaded.tokenizer, model.vocab)
  return loaded


def use_cpu_devices(count: int) -> None:
  """Splits a CPU into `count` devices, unless the environment already says into how many.

  Raises:
    ValueError: when this process uses its CPU already, as another number of devices.
  """
  if not count or 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError as error:  # JAX has begun.
    found = len(jax.local_devices(backend='cpu'))
    if found != count:
      raise ValueError(
        f'config.cpu_devices is {count}, but this process already uses its CPU as {found}; start '
        'a new process'
      ) from error
