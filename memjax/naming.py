"""Names: how a leaf's path is written, the noise it gives, and the answer to an unknown name."""

import difflib
import zlib
from collections.abc import Iterable

import jax
import numpy as np


def path_string(path) -> str:
  """Writes a `jax.tree_util` key path as `'blocks/attn/q/kernel'`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
  """Gives the leaf at `path` its own key.

  The CRC of the path is the same in every process and Python version, which `hash` is not, and
  does not change when other leaves come or go, which an index would.
  """
  return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def nearest(word: str, known: Iterable[str]) -> str:
  """Returns the end of an error's sentence about `word`, which is none of `known`.

  >>> nearest('fsbp', ['data', 'fsdp'])
  "the nearest is 'fsdp'"
  >>> nearest('x', ['data', 'fsdp'])
  'there are data, fsdp'
  """
  close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
  return f'the nearest is {close[0]!r}' if close else f'there are {", ".join(sorted(known))}'
