"""Files that appear whole or not at all, and the sentence when they cannot be written."""

import contextlib
import os
import uuid


@contextlib.contextmanager
def writing(directory):
  """Turns what the system says against writing in a cache directory into a `ValueError`."""
  try:
    yield
  except OSError as error:
    raise ValueError(
      f'{error.filename or directory}: {error.strerror or error}; make room or give permission '
      'there, or name another folder as config.data.cache_dir'
    ) from error


def write_atomically(path, make):
  """Writes the text that `make()` returns, after a try whether there is a place for it."""
  with writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
    try:
      with open(temporary, 'x', encoding='utf-8') as file:
        file.write(make())
      sync(temporary)
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


def sync(path):
  """Waits until a file or directory is on disk, which a later rename may otherwise reach first."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
