"""Rows of labelled files: .jsonl, .json, .csv, .tsv, .label, or a prepared TensorFlow dataset.

Nothing here downloads.
"""

import csv
import gzip
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from memjax.data.sources import Missing, prepared
from memjax.tasks import made_up
from memjax.tasks.task import Example, Task, example


def read(task: Task, path: str, split: str = '') -> list[Example]:
  """Returns all examples of one file, in its order.

  Args:
    task: What the rows are.
    path: A .jsonl (an object a line), .json (a list of objects, or the list under 'data'), .csv or
      .tsv (the first line names the fields, or the task knows the columns) or .label (TREC's own,
      'LABEL:fine text' a line) file, any of them also with '.gz'; or 'tfds:NAME[@DIR][#SPLIT]'; or
      'made_up:COUNT', rows made on the spot to try things out.
    split: Of a TensorFlow dataset, which split, unless `path` names one.

  Raises:
    ValueError: for a file that is not there, is damaged or has no rows, a row without a field, or a
      label outside the range, naming file, line and field.
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
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error
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
  # As they were published; spreadsheets put a mark before the first field.
  encoding = 'latin-1' if kind == '.label' else 'utf-8-sig'
  try:
    with opener(path, 'rt', encoding=encoding, newline='') as file:
      yield from READERS[kind](task, path, file)
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: not UTF-8 ({error}); convert it') from error
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f'{path}: not a whole .gz file ({error}); copy it again') from error


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
  if not isinstance(rows, list):
    raise ValueError(f'{path}: expected a list of objects, not {type(rows).__name__}')
  for number, row in enumerate(rows, 1):
    where = f'{path}, row {number}'
    yield where, _object(row, where)


def _tsv(task, path, file):
  # Quotation marks in these files belong to the text.
  lines = (line.rstrip('\r\n') for line in file)
  yield from _table(task, path, ((i, x.split('\t')) for i, x in enumerate(lines, 1) if x))


def _csv(task, path, file):
  lines = csv.reader(file)
  try:
    yield from _table(task, path, ((lines.line_num, values) for values in lines if values))
  except csv.Error as error:
    raise ValueError(f'{path}, line {lines.line_num}: not CSV ({error})') from error


def _table(task, path, lines):
  """Rows of numbered lines of values, of which the first may say what the columns are."""
  first = next(lines, (1, []))
  known = {*task.fields(), *(theirs for theirs, _ in task.rename)}
  named = not task.columns or not known.isdisjoint(first[1])
  names = first[1] if named else task.columns
  for number, values in lines if named else itertools.chain([first], lines):
    if len(values) < len(names):
      raise ValueError(
        f'{path}, line {number}: {len(values)} columns, but they are {", ".join(names)}'
      )
    yield f'{path}, line {number}', dict(zip(names, values))


def _label(task, path, file):
  for number, line in enumerate(file, 1):
    label, _, rest = line.partition(':')
    if line.strip():
      yield f'{path}, line {number}', {'label': label, 'text': rest.partition(' ')[2].strip()}


def _parsed(text, where) -> Any:
  try:
    return json.loads(text)
  except ValueError as error:
    raise ValueError(f'{where}: not JSON ({error})') from error


def _object(row, where) -> dict:
  if not isinstance(row, dict):
    raise ValueError(f'{where}: expected a JSON object with fields, not {type(row).__name__}')
  return row


READERS = {'.jsonl': _jsonl, '.json': _json, '.tsv': _tsv, '.csv': _csv, '.label': _label}


def _tfds(scheme, split) -> Iterator[tuple[str, dict]]:
  place, _, named = scheme.removeprefix('tfds:').partition('#')
  name, _, data_dir = place.partition('@')
  split = named or split
  root = data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  try:
    examples = prepared(name, root, split)
  except (Missing, ValueError) as error:  # Or there is no such split.
    raise ValueError(
      f'{scheme}: {error}; or name files as config.task.train and config.task.test'
    ) from error
  features = examples.dataset_info.features
  for number, row in enumerate(examples):
    yield f'{scheme}, {split} row {number}', {k: _named(features[k], v) for k, v in row.items()}


def _named(feature, value):
  """A label by its name, since datasets number them apart; all else as it is in JSON."""
  labelled = hasattr(feature, 'int2str') and int(value) >= 0
  return feature.int2str(int(value)) if labelled else _plain(value)


def _plain(value):
  """Bytes as text and arrays as lists."""
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if hasattr(value, 'tolist'):
    return _plain(value.tolist())
  return [_plain(v) for v in value] if isinstance(value, list) else value
