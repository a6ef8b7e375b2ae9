"""What a run leaves on disk beside its checkpoints, and whose it is."""

import contextlib
import fcntl
import json
import os
import pathlib

import jax
from absl import logging
from ml_collections import ConfigDict

from memjax import checkpoint, same_run


def local(directory) -> pathlib.Path:
  """Returns a work directory as a path.

  Raises:
    ValueError: for the address of a bucket.
  """
  if '://' in os.fspath(directory):
    raise ValueError(
      f'the work directory {os.fspath(directory)!r} is an address; a run writes into files that '
      'grow, so name a folder on a file system, which all hosts share, and copy it when it is done'
    )
  return pathlib.Path(directory).expanduser()


@contextlib.contextmanager
def lock(directory: pathlib.Path):
  """Creates the work directory and keeps other runs out; process 0 does for all of a run.

  The system lets go of the lock when the process ends, however it does.

  Raises:
    ValueError: when the directory cannot be written, or another run is in it.
  """
  checkpoint.check_writable(directory)
  if jax.process_index() != 0:
    yield
    return
  with open(directory / '.lock', 'a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(
        f'{directory} is in use by another run; wait for its end, or choose another --workdir'
      ) from None
    except OSError as error:  # Some network file systems have no locks.
      logging.warning('%s cannot be locked (%s); start no second run there', directory, error)
    yield


def prepare(directory: pathlib.Path, config: ConfigDict) -> list[str]:
  """Checks that the work directory is empty or belongs to the same run.

  Returns:
    A sentence for each field that differs from the earlier run's and may.

  Raises:
    ValueError: when it belongs to a run with another config.
  """
  file = directory / 'config.json'
  if not file.exists():
    return []
  return same_run.check(read_json(file), config.to_dict())


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
    'fingerprint': dataset.fingerprint,
  }
  if file.exists():
    before = read_json(file)
    different = [k for k in found if k != 'missing' and before.get(k, found[k]) != found[k]]
    if different:
      k = different[0]
      raise ValueError(
        f'this run began with data {k} {before[k]!r} and now finds {found[k]!r}; bring the data '
        'back, or choose another work directory'
      )
  write_json(file, found)
  write_json(directory / 'config.json', config.to_dict())


def read_json(file: pathlib.Path) -> dict:
  """Reads a JSON object.

  Raises:
    ValueError: naming a file that holds something else.
  """
  try:
    return dict(json.loads(file.read_text()))
  except (ValueError, TypeError) as error:
    raise ValueError(f'{file} is damaged ({error}); remove it') from error


def write_json(file: pathlib.Path, value) -> None:
  """Writes JSON so that a kill leaves the old file or the new one; only process 0 writes."""
  if jax.process_index() == 0:
    temporary = file.with_suffix('.tmp')
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    temporary.replace(file)
