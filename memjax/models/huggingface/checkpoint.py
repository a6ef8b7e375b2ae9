"""What a checkpoint on disk holds, without reading it: its config, and where each tensor lies."""

import json
import pathlib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from memjax.models.huggingface.family import Config, Index, Shape

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.msgpack', '*.h5')

# As they are called in safetensors files; what else there is holds no parameters.
DTYPES = types.MappingProxyType(
  {
    'F64': np.dtype('float64'),
    'F32': np.dtype('float32'),
    'F16': np.dtype('float16'),
    'BF16': jnp.dtype('bfloat16'),
  }
)


class Entry(NamedTuple):
  """One tensor of a checkpoint."""

  shape: Shape
  dtype: np.dtype | None  # None for a dtype that no parameter has, such as int64.
  file: pathlib.Path


class Tensors(Protocol):
  """Tensors by their Hugging Face names; a part of one is read when asked for."""

  path: pathlib.Path  # Of what was opened, for messages.
  entries: Mapping[str, Entry]

  def read(self, key: str, index: Index) -> np.ndarray:
    """Returns `tensor[index]`, in the dtype of its entry."""


class Checkpoint(NamedTuple):
  """A checkpoint that was opened."""

  config: Config
  tensors: Tensors


def open_folder(folder: pathlib.Path) -> Checkpoint:
  """Opens a folder with `config.json` and safetensors, in one file or in several with an index.

  Raises:
    ValueError: for a folder without them, a file that is damaged, or weights that only pickle
      reads; names the file and the way out.
  """
  config = read_config(folder)
  return Checkpoint(config, SafeTensors(folder, _files(folder, config)))


def read_config(folder: pathlib.Path) -> Config:
  """Returns what `config.json` says.

  Raises:
    ValueError: when there is none, or it is not JSON.
  """
  if folder.is_file():
    raise ValueError(
      f'{folder} is a file; give the folder that it is in, or a .gguf file, which has all in one'
    )
  if not folder.is_dir():
    raise ValueError(f'there is no folder {str(folder)!r}')
  path = folder / CONFIG
  if not path.is_file():
    ggufs = sorted(folder.glob('*.gguf'))
    hint = (
      f'its {ggufs[0].name} is loaded by its own path'
      if ggufs
      else ('a folder that `save_pretrained` of transformers wrote has one')
    )
    raise ValueError(f'{folder} has no {CONFIG}; {hint}')
  return Config(_read_json(path), path)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f'{path} is not JSON ({e}); copy the file again') from e
  if not isinstance(found, dict):
    raise ValueError(f'{path} holds a {type(found).__name__} where an object belongs')
  return found


def _files(folder: pathlib.Path, config: Config) -> list[pathlib.Path]:
  """The safetensors files of a folder, all of them there."""
  if (folder / INDEX).is_file():
    named = _read_json(folder / INDEX).get('weight_map')
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
      raise ValueError(f"{folder / INDEX} has no 'weight_map' from tensors to files")
    files = [folder / name for name in dict.fromkeys(named.values())]
    for file in files:
      if not file.is_file():
        raise ValueError(f'{folder / INDEX} names {file.name}, which is not there; copy it too')
    return files
  if (folder / WEIGHTS).is_file():
    return [folder / WEIGHTS]
  pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
  if pickles:
    model = (config.get('architectures') or ['AutoModel'])[0]
    raise ValueError(
      f'{folder} has {pickles[0]} and no {WEIGHTS}. Reading a pickle runs what is in it, so it is '
      f'not done here; where you trust it, convert it once: python -c "from transformers import '
      f"{model} as M; M.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )
  raise ValueError(f'{folder} has neither {WEIGHTS} nor {INDEX}')


class SafeTensors:
  """The tensors of safetensors files, which stay on disk.

  A file is open while a tensor is read and no longer: it is mapped, and pages that were read count
  as this process's memory until it is closed.
  """

  def __init__(self, path: pathlib.Path, files: list[pathlib.Path]):
    self.path = path
    self.entries = {}
    for file in files:
      with _open(file) as opened:
        for key in opened.keys():  # noqa: SIM118
          part = opened.get_slice(key)
          self.entries[key] = Entry(tuple(part.get_shape()), DTYPES.get(part.get_dtype()), file)

  def read(self, key: str, index: Index) -> np.ndarray:
    with _open(self.entries[key].file) as opened:
      return opened.get_slice(key)[index]


def _open(file: pathlib.Path):
  import safetensors

  try:
    return safetensors.safe_open(file, 'numpy')
  except safetensors.SafetensorError as e:
    size = file.stat().st_size
    raise ValueError(
      f'{file} ({size:,} bytes) is not a whole safetensors file ({e}); copy it again'
    ) from e
