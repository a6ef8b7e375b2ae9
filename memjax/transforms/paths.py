"""Names of leaves: the paths that rules, refusals and noise addresses share."""

import zlib

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
