"""Measuring what is on disk: a run's newest checkpoint, or a folder of pretrained weights."""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from memjax import build, checkpoint, pretrained, sharding, workdir
from memjax import config as config_lib
from memjax.build_model import build_model, loaded_fields
from memjax.models import huggingface
from memjax.naming import nearest
from memjax.tasks import loading
from memjax.tasks.evaluation import measure

FILE = 'evaluation.json'


def evaluate_folder(
  folder: str | pathlib.Path,
  tasks: dict[str, dict] | None = None,
  *,
  config: ConfigDict | None = None,
  directory: str | pathlib.Path | None = None,
  devices=None,
) -> dict[str, Any]:
  """Measures a trained or pretrained model on the test splits of tasks.

  Args:
    folder: Work directory of a run, or what `memjax.models.load` reads.
    tasks: Name -> fields of `config.task` to set, such as `{'rte': {'test': 'rte.jsonl'}}`; default
      the task of `config`, else that of the run. With a field `name`, the key is only what a result
      is called. Files to train on are read only where a part of them is tested on or is shown.
    config: Its `task` fields, `seq_len` and micro-batches are used, and for a pretrained model all
      that describes one; needed there, else default what the run was made with.
    directory: Where the results are written; default `folder` if it is a run, else nowhere.
    devices: Devices of the mesh; default all.

  Returns:
    `folder`, `model`, `step` (None of a pretrained model) and `tasks`: for each its scores, the
    number of `examples`, and the `file` they are from. The same is in `evaluation.json`.

  Raises:
    ValueError: for a folder without a checkpoint, a field that `config.task` has not, or whatever
      is wrong with a config or a task.
  """
  folder = pathlib.Path(folder).expanduser()
  is_run = (folder / 'checkpoints').is_dir()
  if is_run:
    own = _config_of_run(folder)
    config = own if config is None else _with_task(own, config)
  elif config is None:
    raise ValueError(
      f'{folder}: not the work directory of a run; to measure pretrained weights, say on what with '
      '--config=configs/glue.py:task=sst2'
    )
  else:
    own = config = ConfigDict(config.to_dict()).unlock()
    config.load = str(folder)
  if tasks is None:
    tasks = {config.task.name: {}}
  if not tasks or not all(tasks):
    raise ValueError(
      'there is no task to measure on; name one, as in --config=configs/glue.py:task=sst2'
    )
  wanted = {name: _fields(config, name, changes) for name, changes in tasks.items()}
  mesh = sharding.make_mesh(**config.mesh.to_dict(), devices=devices)
  sharding.check_batch(build.eval_rows(config), 1, mesh)
  read = _read_run if is_run else _read_pretrained
  model, params, step = read(folder, own, mesh)
  results = {}
  for name, fields in wanted.items():
    results[name] = _measured(fields, config, model, params)
  named = config.load or config.model
  report = {'folder': str(folder), 'model': named, 'step': step, 'tasks': results}
  directory = folder if directory is None and is_run else directory
  if directory is not None:
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    workdir.write_json(pathlib.Path(directory) / FILE, report)
  return report


def _config_of_run(folder):
  file = folder / 'config.json'
  if not file.is_file():
    raise ValueError(f'{folder}: has checkpoints but no config.json, which says of what')
  return ConfigDict(_merged(config_lib.default().to_dict(), json.loads(file.read_text())))


def _with_task(own, given):
  """A run's config with the task and the batches of another, which are to be measured on alone: the
  run's step need not be able to train so.
  """
  config = own.copy_and_resolve_references()
  for field in ('task', 'batch_size', 'seq_len', 'accumulate', 'select'):
    config[field] = given[field]
  return config


def _merged(default, given):
  """A field that is younger than the run has its default."""
  if not isinstance(default, dict) or not isinstance(given, dict):
    return given
  merged = {k: _merged(v, given[k]) if k in given else v for k, v in default.items()}
  return merged | {k: v for k, v in given.items() if k not in default}


def _read_run(folder, config, mesh):
  parts = build.build(config, mesh)
  intervals = {k: v or None for k, v in config.checkpoint.to_dict().items()}
  with checkpoint.Checkpoints(folder / 'checkpoints', **intervals) as checkpoints:
    restored = checkpoints.restore(parts.state)
  if restored is None:
    raise ValueError(f'{folder}: no checkpoint yet; train first')
  state = parts.flush(restored.state)
  return parts.model, parts.view(state['params']), restored.step


def _read_pretrained(folder, config, mesh):
  model = build_model(config, mesh)
  fields = loaded_fields(config, model, mesh)
  return model, huggingface.load(folder, mesh=mesh, **fields)[1], None


def _fields(config, called, changes):
  name = changes.get('name', called)
  fields = ConfigDict(config.task.to_dict()).unlock()
  if name != fields.name:
    # Of another task nothing carries over: neither its files nor its words.
    fields = ConfigDict(config_lib.default().task.to_dict()).unlock()
  for field in changes:
    if field not in fields:
      raise ValueError(
        f'to measure {called!r}: config.task has no field {field!r}; {nearest(field, fields)}'
      )
  fields.update({'name': name, **changes})
  return fields


def _measured(fields, config, model, params):
  tokenizer = pretrained.tokenizer(config)
  where = dict(vocab_size=model.vocab, cache_dir=config.data.cache_dir or config_lib.user_cache())
  data = loading.load_test(fields, model, tokenizer, config.seq_len, **where)
  pretrained.check_tokenizer(config, data.tokenizer, model.vocab)
  scores = measure(model, params, data.task, data.test, build.eval_rows(config))
  file = loading.files(data.task, fields)[1] or fields.dev or data.source
  return {**scores, 'examples': len(data.test), 'file': file}


def show(report: dict[str, Any]) -> str:
  """Returns the results as lines of text."""
  at = '' if report['step'] is None else f', step {report["step"]}'
  lines = [f'{report["folder"]} ({report["model"]}{at})']
  for name, scores in report['tasks'].items():
    numbers = {k: v for k, v in scores.items() if k not in ('examples', 'file')}
    said = ', '.join(f'{metric} {value:.4f}' for metric, value in numbers.items())
    lines.append(f'  {name}: {said} on {scores["examples"]:,} examples of {scores["file"]}')
  return '\n'.join(lines)
