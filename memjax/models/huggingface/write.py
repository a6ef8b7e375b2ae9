"""From a model and its parameters to a Hugging Face folder, a tensor at a time."""

import json
import math
import os
import pathlib
import shutil
import struct
import uuid
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from memjax import weights
from memjax.models.huggingface import checkpoint, families
from memjax.models.huggingface.family import BLOCKS, Family, Name, Shape
from memjax.models.huggingface.read import read_config
from memjax.naming import path_string

SHARD_BYTES = 5 * 2**30  # As large as files of the Hugging Face hub are.
# What a folder holds besides the model, and what the next reader needs.
COMPANIONS = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'vocab.txt',
  'merges.txt',
  'generation_config.json',
  'chat_template.jinja',
)
# Fields of another folder's config that describe its files, or say again what ours say.
NOT_TAKEN = ('dtype', 'rope_parameters', 'layer_types', 'quantization_config', '_name_or_path')
DTYPES = {dtype: name for name, dtype in checkpoint.DTYPES.items()}


def save(
  folder: str | pathlib.Path,
  model: Any,
  params: dict[str, Any],
  *,
  like: str | pathlib.Path | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a folder that `transformers` and `load` read: `config.json` and safetensors.

  All of it appears at once, or nothing does. Weights that are not arrays (adapted, in 8 bits) are
  written as the matrices they stand for. Reads parameters from the devices one layer's tensor at a
  time, so host memory holds a few copies of the largest; over several processes each tensor is
  gathered, and process 0 writes.

  Args:
    folder: Where to; must not exist, or be empty.
    model: Model.
    params: Its parameters, in the dtype to write.
    like: Folder or `.gguf` file that the model was loaded from: its family is kept where two would
      do, its config's other fields (token ids, longest sequence) are, and its tokenizer is copied.
      A warning says why a `.gguf` file's tokenizer cannot be.
    shard_bytes: Bytes a file at most, unless a single tensor has more.

  Raises:
    ValueError: when the folder has files, no family has a model of this form, or parameters are not
      those of the model.
  """
  folder = pathlib.Path(folder).expanduser()
  taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
  if multihost_utils.broadcast_one_to_all(taken):  # Others may look when process 0 has finished.
    raise ValueError(f'{folder} exists already; choose another folder, or delete it')
  like = None if like is None else read_config(like)
  family = _family(model, like)
  tensors = _tensors(family, model, params)
  config = _config(family, model, like, tensors)
  files = _divide(tensors, shard_bytes)
  primary = jax.process_index() == 0
  temporary = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex}')
  try:
    for name, part in files.items():
      _write_safetensors(temporary / name, part, primary)
    if primary:
      if len(files) > 1:
        _write_json(temporary / checkpoint.INDEX, _index(files))
      _copy_companions(like, temporary)
      _write_json(temporary / checkpoint.CONFIG, config)
      os.replace(temporary, folder)
  finally:
    if primary:
      shutil.rmtree(temporary, ignore_errors=True)
  multihost_utils.sync_global_devices(f'save {folder}')


class Tensor(NamedTuple):
  """One tensor to write."""

  shape: Shape
  dtype: np.dtype
  value: Callable[[], np.ndarray]  # Fetched from the devices when called.

  @property
  def bytes(self) -> int:
    """Bytes in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


def _family(model: Any, like: checkpoint.Config | None) -> Family:
  if like is not None:
    family = families.of_config(like)
    if family.holds(model):
      return family
  return families.of_model(model)


def _config(family, model, like, tensors) -> dict[str, Any]:
  first = next(iter(tensors.values()))
  ids = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))  # Of no tokenizer's.
  taken = {k: v for k, v in (like or {}).items() if k not in NOT_TAKEN}
  return ids | taken | family.to_config(model) | {'torch_dtype': first.dtype.name}


def _tensors(family: Family, model: Any, params: dict[str, Any]) -> dict[str, Tensor]:
  """Tensors by key, in the order of the layers."""
  given = jax.tree.leaves_with_path(params, is_leaf=weights.is_weight)
  leaves = {path_string(path): leaf for path, leaf in given}
  shapes = _check(family, model, leaves)
  outside, blocks = {}, {}
  for name in family.names(model):
    groups = blocks if name.path.startswith(BLOCKS) else outside
    groups.setdefault(name.key, []).append(name)
  tensors = {key: _tensor(names, leaves, shapes, None) for key, names in outside.items()}
  for layer in range(model.layers):
    for key, names in blocks.items():
      key = key.replace('{layer}', str(layer))
      tensors[key] = _tensor(names, leaves, shapes, layer)
  return tensors


def _check(family: Family, model: Any, leaves: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes of the parameters as arrays, of one layer where they are stacked."""
  expected = {path_string(p): x.shape for p, x in jax.tree.leaves_with_path(model.abstract())}
  if wrong := sorted(set(expected) ^ set(leaves)):
    what = 'has no parameter' if wrong[0] in leaves else 'needs the parameter'
    raise ValueError(f'the {family.name!r} model {what} {wrong[0]!r}; are these its parameters?')
  shapes = {}
  for path, leaf in leaves.items():
    layer = 0 if path.startswith(BLOCKS) else None
    take = lambda leaf, layer=layer: weights.materialize(_of_layer(leaf, layer))
    shapes[path] = found = jax.eval_shape(take, leaf)
    shape = expected[path] if layer is None else expected[path][1:]
    if found.shape != shape:
      raise ValueError(f'{path!r} has shape {found.shape}, but the model makes it {shape}')
    if found.dtype not in DTYPES:
      raise ValueError(
        f'{path!r} is {found.dtype}; parameters are written as {", ".join(map(str, DTYPES))}'
      )
  return shapes


def _tensor(
  names: list[Name], leaves: dict[str, Any], shapes: dict[str, Any], layer: int | None
) -> Tensor:
  """The tensor that several of our leaves lie in, or one."""
  names = sorted(names, key=lambda name: name.rule.start)
  axis = names[0].rule.axis

  def value():
    parts = [_fetch(_of_layer(leaves[name.path], layer)) for name in names]
    parts = [part.T if name.rule.transpose else part for name, part in zip(names, parts)]
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis))

  sizes = [name.rule.shape(shapes[name.path].shape) for name in names]
  shape = list(sizes[0])
  if len(names) > 1:
    shape[axis] = sum(size[axis] for size in sizes)
  return Tensor(tuple(shape), np.dtype(shapes[names[0].path].dtype), value)


@jax.jit
def _layer(leaf, i):
  take = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
  return jax.tree.map(take, leaf)


def _of_layer(leaf: Any, layer: int | None) -> Any:
  if layer is None:
    return leaf
  return leaf[layer] if isinstance(leaf, np.ndarray) else _layer(leaf, np.int32(layer))


def _fetch(leaf: Any) -> np.ndarray:
  """Returns a matrix in host memory, whatever it is stored as."""
  array = leaf if isinstance(leaf, np.ndarray) else weights.materialize(leaf)
  if isinstance(array, np.ndarray) or array.is_fully_addressable:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def _divide(tensors: dict[str, Tensor], shard_bytes: int) -> dict[str, dict[str, Tensor]]:
  """Files by name, each with as many tensors as it may hold."""
  parts, room = [{}], shard_bytes
  for key, tensor in tensors.items():
    if parts[-1] and tensor.bytes > room:
      parts.append({})
      room = shard_bytes
    parts[-1][key] = tensor
    room -= tensor.bytes
  if len(parts) == 1:
    return {checkpoint.WEIGHTS: parts[0]}
  n = len(parts)
  return {f'model-{i:05d}-of-{n:05d}.safetensors': part for i, part in enumerate(parts, 1)}


def _index(files: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
  total = sum(tensor.bytes for part in files.values() for tensor in part.values())
  where = {key: name for name, part in files.items() for key in part}
  return {'metadata': {'total_size': total}, 'weight_map': where}


def _write_safetensors(path: pathlib.Path, tensors: dict[str, Tensor], primary: bool) -> None:
  """Writes one file: the length of the header (u64), the header in JSON, the tensors' bytes.

  By hand, because the library's writer wants every tensor of the file in memory at once.
  """
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for key, tensor in tensors.items():
    begin, end = end, end + tensor.bytes
    dtype = DTYPES[tensor.dtype]
    header[key] = {'dtype': dtype, 'shape': tensor.shape, 'data_offsets': [begin, end]}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # So that tensors are aligned.
  if primary:
    path.parent.mkdir(parents=True, exist_ok=True)
  with open(path if primary else os.devnull, 'wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors.values():
      file.write(tensor.value().view(np.uint8).data)
    file.flush()
    if primary:
      os.fsync(file.fileno())


def _write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def _copy_companions(like: checkpoint.Config | None, folder: pathlib.Path) -> None:
  if like is None:
    return
  if pathlib.Path(like.path).suffix == '.gguf':
    _write_tokenizer(pathlib.Path(like.path), folder)
    return
  for name in COMPANIONS:
    source = pathlib.Path(like.path).with_name(name)
    if source.is_file():
      shutil.copy(source, folder / name)


def _write_tokenizer(file: pathlib.Path, folder: pathlib.Path) -> None:
  from memjax.models.huggingface.gguf_tokenizer import tokenizer_files

  try:
    files = tokenizer_files(file)
  except ValueError as e:  # The weights are worth keeping all the same.
    warnings.warn(f'no tokenizer is written beside the model: {e}', stacklevel=3)
    return
  for name, text in files.items():
    (folder / name).write_text(text, encoding='utf-8')
