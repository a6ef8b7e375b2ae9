"""Rows of labelled files: .jsonl, .json, .tsv, or a prepared TensorFlow dataset.

Nothing here downloads.
"""

import csv
import gzip
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from memjax.data.sources import Missing, prepared
from memjax.tasks import made_up
from memjax.tasks.task import Example, Task, example


def read(task: Task, path: str, split: str = '') -> list[Example]:
  """Returns all examples of one file, in its order.

  Args:
    task: What the rows are.
    path: A .jsonl (an object a line), .json (a list of objects, or the list under 'data') or .tsv
      (its first line names the fields) file, any of them also with '.gz'; or 'tfds:NAME[@DIR]'; or
      'made_up:COUNT', rows made on the spot to try things out.
    split: Of a TensorFlow dataset, which split.

  Raises:
    ValueError: for a file that is not there or has no rows, a row without a field, or a label
      outside the range, naming file, line and field.
  """
  if path.startswith('made_up:'):
    examples = [example(task, row, where) for where, row in made_up.rows(task, path)]
  else:
    rows = _tfds(path, split) if path.startswith('tfds:') else _file(task, path)
    examples = [e for where, row in rows for e in _examples(task, row, where)]
  if not examples:
    raise ValueError(
      f'{path}: an empty split ({split or "no rows"}), but task {task.name!r} needs examples'
    )
  return examples


def _examples(task, row, where):
  """The examples that one row of a file holds."""
  try:
    prepared_rows = list(task.prepare(_renamed(task, row)))
  except (KeyError, TypeError, AttributeError, IndexError) as error:
    raise ValueError(f'{where}: not a row of task {task.name!r} ({error!r})') from error
  return [example(task, r, where) for r in prepared_rows]


def _renamed(task, row):
  for theirs, ours in task.rename:
    if theirs in row and ours not in row:
      row = row | {ours: row[theirs]}
  return row


def _file(task, path) -> Iterator[tuple[str, dict]]:
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ValueError(
      f'{path}: no such file, which task {task.name!r} was to read; correct the path'
    )
  kind = path.suffixes[-2] if path.suffix == '.gz' and len(path.suffixes) > 1 else path.suffix
  if kind not in READERS:
    raise ValueError(f'{path}: rows are read from {", ".join(READERS)}, not from {kind!r}')
  opener = gzip.open if path.suffix == '.gz' else open
  try:
    with opener(path, 'rt', encoding='utf-8', newline='') as file:
      yield from READERS[kind](task, path, file)
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not UTF-8 ({error}); convert it') from error


def _jsonl(task, path, file):
  for number, line in enumerate(file, 1):
    if line.strip():
      where = f'{path}, line {number}'
      yield where, _object(_parsed(line, where), where)


def _json(task, path, file):
  rows = _parsed(file.read(), path)
  rows = rows['data'] if isinstance(rows, dict) and 'data' in rows else rows
  # DROP maps the names of its passages to them.
  rows = list(rows.values()) if isinstance(rows, dict) else rows
  for number, row in enumerate(rows, 1):
    where = f'{path}, row {number}'
    yield where, _object(row, where)


def _tsv(task, path, file):
  # Quotation marks in these files belong to the text.
  lines = csv.reader(file, delimiter='\t', quoting=csv.QUOTE_NONE)
  names = task.columns or next(lines, ())
  for number, values in enumerate(lines, 1 if task.columns else 2):
    if len(values) < len(names):
      raise ValueError(
        f'{path}, line {number}: {len(values)} columns, but the file names {", ".join(names)}'
      )
    yield f'{path}, line {number}', dict(zip(names, values))


def _parsed(text, where) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:
    raise ValueError(f'{where}: not JSON ({error})') from error


def _object(row, where) -> dict:
  if not isinstance(row, dict):
    raise ValueError(f'{where}: expected a JSON object with fields, not {type(row).__name__}')
  return row


READERS = {'.jsonl': _jsonl, '.json': _json, '.tsv': _tsv}


def _tfds(scheme, split) -> Iterator[tuple[str, dict]]:
  name, _, data_dir = scheme.removeprefix('tfds:').partition('@')
  root = data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  try:
    examples = prepared(name, root, split)
  except Missing as error:
    raise ValueError(
      f'{scheme}: {error}; or name files as config.task.train and config.task.test'
    ) from error
  features = examples.dataset_info.features
  for number, row in enumerate(examples):
    yield f'{scheme}, {split} row {number}', {k: _plain(features, k, v) for k, v in row.items()}


def _plain(features, name, value):
  """Bytes as text and arrays as lists; a label by its name, since datasets number them apart."""
  feature = features.get(name) if hasattr(features, 'get') else None
  if hasattr(feature, 'int2str') and int(value) >= 0:
    return feature.int2str(int(value))
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, dict):
    return {k: _plain({}, k, v) for k, v in value.items()}
  if hasattr(value, 'tolist'):
    return _plain({}, name, value.tolist())
  if isinstance(value, list):
    return [_plain({}, name, v) for v in value]
  return value
