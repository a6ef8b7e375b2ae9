"""What a run leaves on disk beside its checkpoints, and whose it is."""

import json
import pathlib

import jax
from ml_collections import ConfigDict

from memjax import checkpoint
from memjax import config as config_lib


def prepare(directory: pathlib.Path, config: ConfigDict) -> list[str]:
  """Creates the work directory, or checks that it belongs to the same run.

  Returns:
    A sentence for each field that differs from the earlier run's and may.

  Raises:
    ValueError: when the directory cannot be written, or belongs to a run with another config.
  """
  checkpoint.check_writable(directory)
  file = directory / 'config.json'
  if not file.exists():
    return []
  return config_lib.check_same_run(json.loads(file.read_text()), config.to_dict())


def record(directory: pathlib.Path, config: ConfigDict, dataset) -> None:
  """Writes `config.json` and `data.json`, once the data is there: a run that could not begin does
  not claim the directory.

  Raises:
    ValueError: when another source answers now, because resuming would train on other text.
  """
  file = directory / 'data.json'
  train, validation, unit = dataset.counts()
  found = {
    'source': dataset.source,
    'missing': list(dataset.missing),
    f'train_{unit}': train,
    f'validation_{unit}': validation,
    'vocabulary': dataset.tokenizer.vocab_size,
  }
  if file.exists():
    before = json.loads(file.read_text())
    different = [k for k in found if k != 'missing' and before[k] != found[k]]
    if different:
      k = different[0]
      raise ValueError(
        f'this run began with data {k} {before[k]!r} and now finds {found[k]!r}; bring the data '
        'back, or choose another work directory'
      )
  write_json(file, found)
  write_json(directory / 'config.json', config.to_dict())


def write_json(file: pathlib.Path, value) -> None:
  """Writes JSON so that a kill leaves the old file or the new one; only process 0 writes."""
  if jax.process_index() == 0:
    temporary = file.with_suffix('.tmp')
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    temporary.replace(file)
