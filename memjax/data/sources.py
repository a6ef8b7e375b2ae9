"""Where text comes from: a string such as 'stdlib' or 'text:/data/*.txt' becomes documents.

Nothing here downloads. A source that is not on this machine raises `Missing`, whose message says
how to get it.
"""

import glob
import gzip
import hashlib
import json
import os
import pathlib
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from memjax.naming import nearest

# The least text of a piece of a file, except at its end. With whole files, a dozen of them, some
# large, would decide the validation loss.
PIECE_CHARS = 4000


class Missing(Exception):
  """A source that is not available here; the message says what was missing and how to get it."""


class Source(NamedTuple):
  """A stream of documents that can be read again."""

  scheme: str  # The string it was opened from.
  documents: Callable[[], Iterator[str]]  # In a fixed order, one in memory at a time.
  identity: str  # Changes when the text may have changed; cheap to compute.


def open_first(schemes):
  """Opens the first source that is available.

  Args:
    schemes: Scheme strings, tried in order:
      'stdlib': the Python files that come with the interpreter, without tests and generated
        tables; a document is 4,000 characters or more of one, up to a top-level `def` or `class`.
        Some 2.5 million tokens of a vocabulary of 8,192, on every machine; Python versions differ.
      'text:GLOB': UTF-8 files in sorted order, '**' matches any depth. A file of up to 8,000
        characters is a document; a longer one is several, cut at the ends of paragraphs.
      'jsonl:GLOB:FIELD': a document a line, the string `FIELD` of its JSON object; files that end
        in '.gz' are decompressed.
      'tfds:NAME[@DATA_DIR]': feature 'text' of the 'train' split of a TensorFlow dataset that was
        prepared with `file_format='array_record'`. Needs `tensorflow-datasets`, not TensorFlow.

  Returns:
    (source, missing): the source, and a sentence for each earlier one that was not available.

  Raises:
    ValueError: for an unknown scheme, naming the nearest known one; when no source is available,
      listing what to do.
  """
  if not schemes:
    raise ValueError("no data source was given; 'stdlib' is on every machine")
  for scheme in schemes:
    _check_scheme(scheme)
  missing = []
  for scheme in schemes:
    kind, _, rest = scheme.partition(':')
    try:
      documents, identity = OPENERS[kind](rest)
    except Missing as error:
      missing.append(f'{scheme}: {error}')
    else:
      return Source(scheme, documents, f'{scheme} {identity}'), tuple(missing)
  raise ValueError('no data source is available:\n' + '\n'.join(missing))


def _check_scheme(scheme):
  kind, _, rest = scheme.partition(':')
  if kind not in OPENERS:
    raise ValueError(f'data source {scheme!r}: unknown scheme {kind!r}; {nearest(kind, OPENERS)}')
  if (kind == 'stdlib') != (not rest):
    form = {'text': 'text:GLOB', 'jsonl': 'jsonl:GLOB:FIELD', 'tfds': 'tfds:NAME'}.get(kind, kind)
    raise ValueError(f'data source {scheme!r}: write {form!r}')


def _stdlib(_):
  root = sysconfig.get_path('stdlib')
  paths = sorted(_library_files(root))
  if not paths:
    raise Missing(
      f'no .py files under {root}; use an interpreter whose library is not in an archive'
    )

  def documents():
    for path in paths:
      with tokenize.open(path) as file:  # Honours the encoding that the file declares.
        yield from _definitions(file)

  return documents, _stat_identity(paths)


def _library_files(root):
  """Leaves out tests, installed packages, and what a program wrote: tables and build settings."""
  left_out = {'site-packages', 'dist-packages', 'encodings', 'pydoc_data'}
  for directory, subdirectories, names in os.walk(root):
    subdirectories[:] = [
      d for d in subdirectories if d not in left_out and not d.startswith(('test', 'idle_test'))
    ]
    for name in names:
      if name.endswith('.py') and not name.startswith('_sysconfigdata'):
        yield os.path.join(directory, name)


def _definitions(lines):
  """Cuts a Python file before top-level definitions."""
  piece, chars = [], 0
  for line in lines:
    if chars >= PIECE_CHARS and line.startswith(('def ', 'class ', 'async def ', '@')):
      yield ''.join(piece)
      piece, chars = [], 0
    piece.append(line)
    chars += len(line)
  yield ''.join(piece)


def _paragraphs(text):
  """Cuts a text after the next paragraph; of one without, after the next line, word or letter."""
  start = 0
  while len(text) - start > 2 * PIECE_CHARS:
    soon = text[start + PIECE_CHARS : start + 2 * PIECE_CHARS]
    end = next(end for end in ('\n\n', '\n', ' ', '') if end in soon)
    stop = start + PIECE_CHARS + soon.index(end) + len(end)
    yield text[start:stop]
    start = stop
  yield text[start:]


def _text(pattern):
  paths = _match(pattern)

  def documents():
    for path in paths:
      yield from _paragraphs(_read_text(path))

  return documents, _stat_identity(paths)


def _read_text(path):
  try:
    return pathlib.Path(path).read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path}: not UTF-8 ({error}); convert it, or leave it out of the glob'
    ) from error
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror or error})') from error


def _jsonl(rest):
  pattern, _, field = rest.rpartition(':')
  if not pattern or not field:
    raise ValueError(
      f"data source 'jsonl:{rest}': write 'jsonl:GLOB:FIELD', e.g. 'jsonl:/data/*.jsonl:text'"
    )
  paths = _match(pattern)

  def documents():
    for path in paths:
      yield from _read_jsonl(path, field)

  return documents, _stat_identity(paths)


def _read_jsonl(path, field):
  for number, line in enumerate(_lines(path), 1):
    if not line.strip():
      continue
    try:
      document = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, IndexError) as error:
      raise ValueError(
        f'{path}, line {number}: expected a JSON object with field {field!r} ({error!r})'
      ) from error
    if not isinstance(document, str):
      raise ValueError(
        f'{path}, line {number}: field {field!r} is {type(document).__name__}, not a string'
      )
    # JSON can spell half of a surrogate pair, which is no text to any tokenizer.
    yield document.encode(errors='replace').decode()


def _lines(path):
  try:
    with gzip.open(path, 'rb') if str(path).endswith('.gz') else open(path, 'rb') as lines:
      yield from lines
  except (OSError, EOFError, zlib.error) as error:  # What gzip raises for another or a torn file.
    raise ValueError(f'{path}: cannot be read ({error}); fetch the file again') from error


def _match(pattern):
  paths = sorted(
    p for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)
  )
  if not paths:
    raise Missing(f'no file matches {pattern}; put one there, or correct the path')
  return paths


def _stat_identity(paths):
  """Names, sizes and modification times: as good as hashing the text for a cache key, and free."""
  stats = [(str(p), s.st_size, s.st_mtime_ns) for p, s in ((p, os.stat(p)) for p in paths)]
  return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _tfds(rest):
  name, _, data_dir = rest.partition('@')
  root = data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
  examples = prepared(name, root, 'train')
  features = examples.dataset_info.features
  if 'text' not in features:
    raise ValueError(f"data source tfds:{name} has no feature 'text', only {sorted(features)}")
  directory = _prepared_directory(_path(root), name)
  info = (directory / 'dataset_info.json').read_text()
  identity = hashlib.sha256(f'{directory} {info}'.encode()).hexdigest()
  return lambda: (example['text'].decode() for example in examples), identity


def prepared(name, root, split):
  """Opens one split of a TensorFlow dataset for random access, if it is prepared on this disk.

  Args:
    name: The dataset's name, such as 'c4/en' or 'glue/sst2:2.0.0'.
    root: Folder in which datasets are prepared.
    split: Such as 'train'.

  Raises:
    Missing: when the library or the dataset is not here, saying how to get it.
  """
  try:
    import tensorflow_datasets as tfds

    directory = _prepared_directory(_path(root), name)
  except ImportError as error:
    raise Missing(f"needs TensorFlow Datasets ({error}); pip install 'memjax[tfds]'") from error
  how = (
    f"prepare it once with tfds.builder({name!r}, data_dir={root!r}, file_format='array_record')"
    '.download_and_prepare()'
  )
  # Not `tfds.builder(name)`, which asks the network about a dataset that is not on this disk.
  if directory is None:
    raise Missing(f'not prepared in {root}; {how}')
  try:
    return tfds.builder_from_directory(directory).as_data_source(split)
  except NotImplementedError as error:
    raise Missing(f'{directory} was not prepared for random access; {how}') from error


def _path(root):
  from etils import epath

  return epath.Path(root).expanduser()


def _prepared_directory(root, name):
  """Finds `root/name[/config]/version`; the newest version unless `name` ends in ':version'."""
  name, _, version = name.partition(':')
  found = [p.parent for p in (root / name).glob(f'{version or "*"}/dataset_info.json')]
  if not found:
    return None
  return max(found, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split('.')])


OPENERS = {'stdlib': _stdlib, 'text': _text, 'jsonl': _jsonl, 'tfds': _tfds}
