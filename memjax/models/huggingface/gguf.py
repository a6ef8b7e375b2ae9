"""GGUF files, as llama.cpp has them: quantised weights of the LLaMA and Qwen families as arrays.

A file is shown as the Hugging Face checkpoint that it was made from: its metadata as a config, its
tensors by their Hugging Face names, matrices dequantised to float32 as they are read.

Shapes in this file: queries and keys have `N` heads of width `H`.
"""

import functools
import pathlib
import re
import types
from typing import Any

import numpy as np

from memjax.models.huggingface.checkpoint import Checkpoint, Entry
from memjax.models.huggingface.family import Config, Index
from memjax.naming import nearest

LAYER = 'model.layers.{layer}'
# Their tensors -> ours; each ends with '.weight' or '.bias'.
TENSORS = types.MappingProxyType(
  {
    'token_embd': 'model.embed_tokens',
    'output_norm': 'model.norm',
    'output': 'lm_head',
    'blk.{layer}.attn_norm': f'{LAYER}.input_layernorm',
    'blk.{layer}.attn_q': f'{LAYER}.self_attn.q_proj',
    'blk.{layer}.attn_k': f'{LAYER}.self_attn.k_proj',
    'blk.{layer}.attn_v': f'{LAYER}.self_attn.v_proj',
    'blk.{layer}.attn_q_norm': f'{LAYER}.self_attn.q_norm',
    'blk.{layer}.attn_k_norm': f'{LAYER}.self_attn.k_norm',
    'blk.{layer}.attn_output': f'{LAYER}.self_attn.o_proj',
    'blk.{layer}.ffn_norm': f'{LAYER}.post_attention_layernorm',
    'blk.{layer}.ffn_gate': f'{LAYER}.mlp.gate_proj',
    'blk.{layer}.ffn_up': f'{LAYER}.mlp.up_proj',
    'blk.{layer}.ffn_down': f'{LAYER}.mlp.down_proj',
  }
)
# `general.architecture` -> theirs in a config.
ARCHITECTURES = types.MappingProxyType(
  {'llama': 'LlamaForCausalLM', 'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM'}
)
# Metadata after the architecture's name -> the config's field.
FIELDS = types.MappingProxyType(
  {
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'block_count': 'num_hidden_layers',
    'context_length': 'max_position_embeddings',
    'attention.head_count': 'num_attention_heads',
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.key_length': 'head_dim',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
    'rope.freq_base': 'rope_theta',
  }
)
# Llama 3.1's scaling is in a file as one factor for each pair of dimensions; its models have 3.
ROTATIONS = 'rope_freqs.weight'
LLAMA3 = types.MappingProxyType(
  dict(rope_type='llama3', low_freq_factor=1.0, high_freq_factor=4.0)
  | dict(original_max_position_embeddings=8192)
)


def open_file(path: pathlib.Path) -> Checkpoint:
  """Opens a file as the Hugging Face checkpoint that it was made from.

  Raises:
    ImportError: without the package `gguf`.
    ValueError: for a damaged file, an architecture that is not known, a matrix in a form that
      `gguf` does not decode, or scaled rotations other than Llama 3.1's; names file and key.
  """
  reader = open_reader(path)
  tensors = GGUFTensors(path, reader)
  return Checkpoint(_config(path, reader, tensors), tensors)


def open_reader(path: pathlib.Path) -> Any:
  """Returns `gguf.GGUFReader(path)`, whose tensors stay on disk.

  Raises:
    ImportError: without the package `gguf`.
    ValueError: when there is no such file, or it is damaged.
  """
  if not path.is_file():
    raise ValueError(f'there is no file {str(path)!r}')
  stat = path.stat()
  try:
    return _read_header(path, stat.st_size, stat.st_mtime_ns)
  except (ValueError, IndexError, KeyError) as e:
    raise ValueError(
      f'{path} ({stat.st_size:,} bytes) is not a whole GGUF file ({e}); copy it again'
    ) from e


@functools.lru_cache(maxsize=1)
def _read_header(path: pathlib.Path, size: int, modified: int) -> Any:
  """Reads once, for the model and for its tokenizer, whose pieces take seconds."""
  try:
    import gguf
  except ImportError as e:
    raise ImportError(
      f"{path}: reading GGUF takes the package gguf: pip install 'memjax[gguf]'"
    ) from e
  return gguf.GGUFReader(path)


def metadata(reader: Any, field: str, default: Any = None) -> Any:
  """Returns a field of a file's metadata as a Python value."""
  found = reader.get_field(field)
  return default if found is None else found.contents()


class GGUFTensors:
  """The tensors of a GGUF file by their Hugging Face names."""

  def __init__(self, path: pathlib.Path, reader: Any):
    self.path = path
    self.kind = metadata(reader, 'general.architecture')
    self.heads = {
      name: metadata(reader, f'{self.kind}.attention.{count}')
      for name, count in (('q_proj', 'head_count'), ('k_proj', 'head_count_kv'))
    }
    self.heads['k_proj'] = self.heads['k_proj'] or self.heads['q_proj']
    self.rotations = None
    self._tensors, self.entries = {}, {}
    self._last = None  # A device's part is cut from the whole matrix, which others read too.
    for tensor in reader.tensors:
      if tensor.name == ROTATIONS:
        self.rotations = np.asarray(tensor.data, np.float32)
        continue
      key = hugging_face_name(tensor.name)
      shape = tuple(int(n) for n in reversed(tensor.shape))
      dtype = tensor.data.dtype if tensor.tensor_type.name == 'F16' else np.dtype('float32')
      self._tensors[key] = tensor
      self.entries[key] = Entry(shape, dtype, path)

  def read(self, key: str, index: Index) -> np.ndarray:
    if self._last is None or self._last[0] != key:
      self._last = (key, self._whole(key))
    return self._last[1][index]

  def _whole(self, key: str) -> np.ndarray:
    import gguf

    tensor, entry = self._tensors[key], self.entries[key]
    if tensor.tensor_type.name == 'F16':
      array = np.asarray(tensor.data)
    else:
      try:
        # Not as a memmap, whose every slice costs ten times an array's.
        array = gguf.quants.dequantize(tensor.data.view(np.ndarray), tensor.tensor_type)
      except NotImplementedError as e:
        raise ValueError(
          f'{self.path}: tensor {tensor.name!r} is stored as {tensor.tensor_type.name}, which the '
          'package gguf does not decode; choose a file in Q8_0, Q4_K or F16'
        ) from e
    array = array.reshape(entry.shape)
    projection = key.split('.')[-2]
    if self.kind == 'llama' and projection in self.heads:
      return half_rotated(array, self.heads[projection])
    return array


def hugging_face_name(name: str) -> str:
  """Returns what a tensor is called in Hugging Face checkpoints, its own name if that is unknown.

  >>> hugging_face_name('blk.3.ffn_up.weight')
  'model.layers.3.mlp.up_proj.weight'
  """
  stem, _, kind = name.rpartition('.')
  layer = re.match(r'blk\.(\d+)\.', stem)
  pattern = re.sub(r'^blk\.\d+\.', 'blk.{layer}.', stem)
  if pattern not in TENSORS:
    return name
  theirs = TENSORS[pattern].replace('{layer}', layer[1]) if layer else TENSORS[pattern]
  return f'{theirs}.{kind}'


def half_rotated(array: np.ndarray, heads: int) -> np.ndarray:
  """Undoes llama.cpp's order of the rows of queries and keys.

  There dimensions `2i` and `2i + 1` of a head are rotated together, here `i` and `i + H/2`.

  Args:
    array: `[N H, ...]`.
    heads: `N`.

  >>> half_rotated(np.arange(8), 2).tolist()
  [0, 2, 1, 3, 4, 6, 5, 7]
  """
  rows, *rest = array.shape
  pairs = array.reshape(heads, rows // heads // 2, 2, *rest)
  return pairs.swapaxes(1, 2).reshape(array.shape)


def _config(path: pathlib.Path, reader: Any, tensors: GGUFTensors) -> Config:
  kind = tensors.kind
  if kind not in ARCHITECTURES:
    raise ValueError(
      f"{path}: 'general.architecture' {kind!r} is not supported; "
      f'{nearest(str(kind), ARCHITECTURES)}'
    )
  known = {field: metadata(reader, f'{kind}.{name}') for name, field in FIELDS.items()}
  fields = {field: _shortest(value) for field, value in known.items() if value is not None}
  embedding = tensors.entries.get('model.embed_tokens.weight')
  fields |= {
    'architectures': [ARCHITECTURES[kind]],
    'model_type': kind,
    'vocab_size': embedding.shape[0] if embedding else metadata(reader, f'{kind}.vocab_size'),
    'tie_word_embeddings': 'lm_head.weight' not in tensors.entries,
  }
  for name in ('bos', 'eos'):
    fields[f'{name}_token_id'] = metadata(reader, f'tokenizer.ggml.{name}_token_id')
  config = Config(fields, path)
  _check_same(reader, kind, config)
  if tensors.rotations is not None:
    config['rope_scaling'] = _scaling(config, tensors.rotations)
  return config


def _check_same(reader: Any, kind: str, config: Config) -> None:
  """Refuses what would change the mathematics."""
  head_dim = config.get('head_dim') or config['hidden_size'] // config['num_attention_heads']
  for name, only in (
    ('rope.dimension_count', head_dim),
    ('expert_count', 0),
    ('rope.scaling.type', 'none'),
    ('attention.value_length', head_dim),
  ):
    found = metadata(reader, f'{kind}.{name}', only)
    if found != only:
      raise ValueError(
        f"{config.path}: '{kind}.{name}' is {found!r}; it is computed here with {only!r} only"
      )


def _scaling(config: Config, factors: np.ndarray) -> dict[str, Any]:
  """The scaling that gives these factors, of those that Llama 3.1 and its successors have."""
  from memjax.models.rotary import RopeScaling, frequencies

  width, factor = 2 * len(factors), float(factors.max())
  theta = config.either('rope_theta', 10_000.0)
  plain, scaled = frequencies(width, theta), frequencies(width, theta, RopeScaling(factor))
  if not np.allclose(factors, plain / scaled, rtol=1e-3):
    raise ValueError(
      f'{config.path}: tensor {ROTATIONS!r} slows rotations otherwise than Llama 3.1 does, which '
      'is the only way computed here'
    )
  return {**LLAMA3, 'factor': factor}


def _shortest(value: Any) -> Any:
  """A float32 of the file as the number that was meant: 1e-05 and not 9.999999747378752e-06."""
  return float(str(np.float32(value))) if isinstance(value, float) else value
