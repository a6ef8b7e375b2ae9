"""Compressed models as a file: products stay two factors, as `compressed` left them.

A safetensors file. A key is the path of an array (`blocks/attn/q/kernel`); in place of a matrix
that is a product are three: its factors `.../a` and `.../b`, and `.../factor`, what their product
is multiplied by.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from memjax import weights
from memjax.adapters.peft import fetch
from memjax.models.huggingface.checkpoint import SafeTensors
from memjax.naming import path_string

PARTS = {'a', 'b', 'factor'}


def save_products(file: str | pathlib.Path, params: Any) -> None:
  """Writes parameters of which matrices are products, in the memory that they take.

  Args:
    file: Where to, such as `model.safetensors`.
    params: Nested dict of arrays and `memjax.weights.Product`. Over several processes they are
      gathered, and process 0 writes.

  Raises:
    ValueError: naming a leaf that is neither.
  """
  from safetensors.numpy import save_file

  tensors = {}
  for path, leaf in jax.tree.leaves_with_path(params, is_leaf=weights.is_weight):
    path = path_string(path)
    if isinstance(leaf, weights.Product):
      tensors |= {f'{path}/a': fetch(leaf.a), f'{path}/b': fetch(leaf.b)}
      tensors[f'{path}/factor'] = np.array([leaf.scale])
    elif weights.is_weight(leaf):
      raise ValueError(
        f'{path} is a {type(leaf).__name__}, but this file holds arrays and products; take '
        'memjax.adapters.compressed(params), or merge and save the model'
      )
    else:
      tensors[path] = fetch(leaf)
  if jax.process_index() == 0:
    tensors = {path: np.ascontiguousarray(x) for path, x in tensors.items()}
    save_file(tensors, pathlib.Path(file).expanduser())
  multihost_utils.sync_global_devices(f'save {file}')


def load_products(file: str | pathlib.Path) -> Any:
  """Returns the parameters of a file that `save_products` wrote, for the model that they were of.

  Raises:
    ValueError: for a file that is damaged or missing.
  """
  file = pathlib.Path(file).expanduser()
  if not file.is_file():
    raise ValueError(f'there is no file {file}; memjax.adapters.save_products writes one')
  tensors, tree = SafeTensors(file, [file]), {}
  for path, entry in tensors.entries.items():
    *above, last = path.split('/')
    node = tree
    for name in above:
      node = node.setdefault(name, {})
    node[last] = jnp.asarray(tensors.read(path, (slice(None),) * len(entry.shape)))
  return _joined(tree)


def _joined(node):
  if not isinstance(node, dict):
    return node
  if set(node) == PARTS:
    return weights.Product(node['a'], node['b'], float(node['factor'][0]))
  return {name: _joined(child) for name, child in node.items()}
