"""From a checkpoint on disk to a model and its parameters, a tensor at a time.

Shapes in this file: a leaf of the blocks is stacked, `[L, ...]`, and filled layer after layer.
"""

import collections
import dataclasses
import functools
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from memjax import sharding as sharding_lib
from memjax.models.huggingface import checkpoint as checkpoint_lib
from memjax.models.huggingface import families
from memjax.models.huggingface.checkpoint import Checkpoint, Tensors, open_folder
from memjax.models.huggingface.family import BLOCKS, Config, Family, Index, Name, Shape
from memjax.models.stacked import check_fields
from memjax.naming import nearest, path_string


def load(
  path: str | pathlib.Path,
  dtype: Any = None,
  *,
  mesh: Mesh | None = None,
  shardings: Any = None,
  key: jax.Array | None = None,
  **fields: Any,
) -> tuple[Any, dict[str, Any]]:
  """Reads a model and its parameters.

  Reads only what this process's devices hold, one layer's tensor at a time: besides the parameters
  where they belong, which may be the host's memory, that holds a few copies of the largest tensor,
  not the model. Communicates nothing.

  Args:
    path: A folder with `config.json` and safetensors (`model.safetensors`, or several files with
      `model.safetensors.index.json`), or a `.gguf` file.
    dtype: Of the parameters and of activations; default what most of the checkpoint is in. Differ
      with `param_dtype`.
    mesh: Spreads parameters over it by the model's rules; default the first device.
    shardings: Tree of shardings, one a parameter, instead of a mesh.
    key: PRNG key of what the checkpoint lacks and may lack, as a new task's head; default
      `jax.random.key(0)`. A warning names what was drawn.
    **fields: Fields of the model to set or change, such as `remat='full'`.

  Returns:
    `(model, params)`.

  Raises:
    ValueError: naming the file and the tensor or field, for an architecture that is unknown, a
      tensor that is missing, unexpected or of another shape, a damaged file, or a pickle.
  """
  checkpoint = _open(path)
  family, model = _model(checkpoint, dtype, fields)
  found = match(family, model, checkpoint.tensors)
  abstract = model.abstract()
  if shardings is None:
    shardings = _default_shardings(model, abstract, mesh)
  drawn = [path for path, tensor in found.items() if tensor is None]
  values = _draw(model, drawn, shardings, key)

  def read(path, leaf, sharding):
    path = path_string(path)
    return (
      values[path] if path in values else _read(checkpoint.tensors, found[path], leaf, sharding)
    )

  return model, jax.tree.map_with_path(read, abstract, shardings)


def describe(path: str | pathlib.Path, dtype: Any = None, **fields: Any) -> Any:
  """Returns the model that `load` would, with its sizes and without reading any parameter."""
  return _model(_open(path), dtype, fields)[1]


def read_config(path: str | pathlib.Path) -> Config:
  """Returns what the `config.json` of a folder says, or would say of a `.gguf` file."""
  path = pathlib.Path(path).expanduser()
  return _open(path).config if path.suffix == '.gguf' else checkpoint_lib.read_config(path)


class Tensor(NamedTuple):
  """The tensor of one of our leaves, in a checkpoint that was found to hold it."""

  name: Name
  keys: tuple[str, ...]  # One a layer where the leaf is stacked, else one.


def match(family: Family, model: Any, tensors: Tensors) -> dict[str, Tensor | None]:
  """Returns `{our path: its tensor}`, None for leaves to be drawn.

  Raises:
    ValueError: naming a tensor that is missing, unexpected or of another shape, and its file.
  """
  shapes = {path_string(p): x.shape for p, x in jax.tree.leaves_with_path(model.abstract())}
  names = family.names(model)
  if {name.path for name in names} != set(shapes):
    wrong = {name.path for name in names} ^ set(shapes)
    raise ValueError(f'the table of {family.name!r} and its model differ in {sorted(wrong)}')
  bare = not any(key.startswith(family.prefix) for key in tensors.entries)
  whole = _whole_shapes(names, shapes)
  found = {}
  for name in names:
    layers = model.layers if name.path.startswith(BLOCKS) else 1
    key = name.key.removeprefix(family.prefix) if bare else name.key
    keys = [key.replace('{layer}', str(layer)) for layer in range(layers)]
    keys = tuple(_spelt(family, key, tensors) for key in keys)
    if name.drawn and keys[0] not in tensors.entries:
      found[name.path] = None
      continue
    for key in keys:
      _check_entry(tensors, key, whole[name.key], name)
    found[name.path] = Tensor(name, keys)
  _check_rest(family, tensors, found)
  return found


def _spelt(family: Family, key: str, tensors: Tensors) -> str:
  """Returns the key as the checkpoint spells it; as it is where the tensor is missing."""
  older = (key.replace(part, other) for part, other in family.spellings)
  return next((k for k in (key, *older) if k in tensors.entries), key)


def _whole_shapes(names: tuple[Name, ...], shapes: dict[str, Shape]) -> dict[str, Shape]:
  """Shapes of their tensors, of which several of ours may be parts."""
  whole = {}
  for name in names:
    shape = shapes[name.path][1:] if name.path.startswith(BLOCKS) else shapes[name.path]
    shape = list(name.rule.shape(shape))
    if name.rule.stop is not None:
      before = whole.get(name.key, shape)[name.rule.axis]
      shape[name.rule.axis] = max(name.rule.stop, before)
    whole[name.key] = tuple(shape)
  return whole


def _check_entry(tensors: Tensors, key: str, shape: Shape, name: Name) -> None:
  if key not in tensors.entries:
    raise ValueError(
      f'{tensors.path}: tensor {key!r} is missing, which {name.path!r} is read from; '
      f'{nearest(key, tensors.entries)}'
    )
  entry = tensors.entries[key]
  if entry.shape != shape:
    raise ValueError(
      f'{entry.file}: tensor {key!r} has shape {entry.shape}, but the config makes it {shape}'
    )
  if entry.dtype is None:
    raise ValueError(
      f'{entry.file}: tensor {key!r} is not of a floating dtype that is read here (float32, '
      'float16, bfloat16, float64); load it with what quantised it, and save it in one of them'
    )


def _check_rest(family: Family, tensors: Tensors, found: dict[str, Tensor | None]) -> None:
  used = {key for tensor in found.values() if tensor is not None for key in tensor.keys}
  for key, entry in tensors.entries.items():
    if key not in used and not any(re.search(pattern, key) for pattern in family.ignored):
      raise ValueError(
        f'{entry.file}: tensor {key!r} belongs to no parameter of this {family.name!r} model; the '
        'config may be that of another checkpoint'
      )


def _open(path: str | pathlib.Path) -> Checkpoint:
  path = pathlib.Path(path).expanduser()
  if path.suffix == '.gguf':
    from memjax.models.huggingface import gguf  # An optional library.

    return gguf.open_file(path)
  return open_folder(path)


def _model(checkpoint: Checkpoint, dtype: Any, fields: dict[str, Any]) -> tuple[Family, Any]:
  family = families.of_config(checkpoint.config)
  model = _to_model(family, checkpoint.config)
  check_fields(type(model), fields)
  dtype = jnp.dtype(_main_dtype(checkpoint.tensors) if dtype is None else dtype)
  return family, dataclasses.replace(model, **{'dtype': dtype, 'param_dtype': dtype, **fields})


def _to_model(family: Family, config: Config) -> Any:
  try:
    return family.to_model(config)
  except ValueError as e:  # Of sizes that do not fit together a model says all but where they are.
    if str(config.path) in str(e):
      raise
    raise ValueError(f'{config.path}: {e}') from e


def _main_dtype(tensors: Tensors) -> np.dtype:
  """The dtype of most numbers; float64, which parameters are only by mistake, as float32."""
  numbers = collections.Counter()
  for entry in tensors.entries.values():
    if entry.dtype is not None:
      numbers[entry.dtype] += int(np.prod(entry.shape))
  dtype = numbers.most_common(1)[0][0] if numbers else np.dtype('float32')
  return np.dtype('float32') if dtype == np.float64 else dtype


def _default_shardings(model: Any, abstract: Any, mesh: Mesh | None) -> Any:
  if mesh is None:
    device = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: device, abstract)
  return sharding_lib.param_shardings(abstract, model.SHARDING, mesh)


def _draw(model: Any, paths: list[str], shardings: Any, key: jax.Array | None) -> dict[str, Any]:
  """Draws some of the parameters, and says so."""
  if not paths:
    return {}
  warnings.warn(
    f'the checkpoint has no {", ".join(paths)}: drawn at random, to be trained', stacklevel=3
  )
  flat = lambda tree: {path_string(p): x for p, x in jax.tree.leaves_with_path(tree)}
  places = flat(shardings)
  pick = lambda key: {path: flat(model.init(key))[path] for path in paths}
  # Compiled, what is not returned is not drawn.
  draw = jax.jit(pick, out_shardings={path: places[path] for path in paths})
  return draw(jax.random.key(0) if key is None else key)


def _read(tensors: Tensors, tensor: Tensor, leaf: jax.ShapeDtypeStruct, sharding: Sharding):
  """Returns one leaf where it belongs."""
  part = functools.partial(_part, tensors, tensor.name, dtype=leaf.dtype)
  if not tensor.name.path.startswith(BLOCKS):
    read = _once(functools.partial(part, tensor.keys[0], leaf.shape))
    return jax.make_array_from_callback(leaf.shape, sharding, read)
  layer_shape = leaf.shape[1:]
  zeros, put = _stacking(leaf.shape, leaf.dtype, sharding)
  stack, layer_sharding = zeros(), _of_layer(sharding, None)
  for i, key in enumerate(tensor.keys):
    read = _once(functools.partial(part, key, layer_shape))
    layer = jax.make_array_from_callback(layer_shape, layer_sharding, read)
    # Waited for, or a reader faster than the device would fill host memory with layers in transit.
    stack = put(stack, layer, np.int32(i)).block_until_ready()
  return stack


def _part(
  tensors: Tensors, name: Name, key: str, shape: Shape, index: Index, *, dtype: np.dtype
) -> np.ndarray:
  """Returns part of one of our leaves, of one layer where it is stacked."""
  part = tensors.read(key, name.rule.index(index, shape))
  return np.ascontiguousarray(part.T if name.rule.transpose else part).astype(dtype, copy=False)


def _once(read: Callable[[Index], np.ndarray]) -> Callable[[Index], np.ndarray]:
  """Returns a function of an index that reads once what several devices hold."""
  parts = {}

  def part(index):
    spans = tuple((span.start, span.stop) for span in index)
    if spans not in parts:
      parts[spans] = read(index)
    return parts[spans]

  return part


@functools.lru_cache(maxsize=64)
def _stacking(shape: Shape, dtype: np.dtype, sharding: Sharding):
  """Programs that make a stack and that write a layer into it in place; leaves share them.

  Where the stack is in the host's memory, only a layer of it is ever on the device.
  """
  home = _of_layer(sharding, sharding.memory_kind)
  send = lambda layer: jax.device_put(layer, home)

  def zeros():
    return jax.lax.map(lambda _: send(jnp.zeros(shape[1:], dtype)), jnp.arange(shape[0]))

  def write(stack, layer, i):
    return jax.lax.dynamic_update_index_in_dim(stack, send(layer), i, 0)

  make = lambda f, **donated: jax.jit(f, out_shardings=sharding, **donated)
  return make(zeros), make(write, donate_argnums=0)


def _of_layer(sharding: Sharding, kind: str | None) -> Sharding:
  """Where one layer of a stacked leaf belongs, in a kind of memory; None is the device's own."""
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=kind)
  return SingleDeviceSharding(*sharding.device_set, memory_kind=kind)
