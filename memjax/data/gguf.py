"""The tokenizer inside a GGUF file, as a `tokenizer.json`."""

import json
import pathlib
import types

from memjax.models.huggingface.gguf import metadata, open_reader
from memjax.naming import nearest

# What text is cut into before pieces are merged, by `tokenizer.ggml.pre`.
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
QWEN2 = LLAMA3.replace('{1,3}', '')
CUTS = types.MappingProxyType(
  {
    'default': None,
    'gpt-2': None,
    'smollm': 'digits',
    'llama-bpe': LLAMA3,
    'qwen2': QWEN2,
  }
)
CONTROL, USER_DEFINED = 3, 4  # `tokenizer.ggml.token_type` of pieces that text never is cut into.


def tokenizer_json(path: pathlib.Path) -> tuple[str, int]:
  """Returns the text of a `tokenizer.json`, and the id that ends a document.

  Raises:
    ImportError: without the package `gguf`.
    ValueError: for a file without a byte-level BPE, or one that cuts text in a way unknown here.
  """
  import tokenizers

  reader = open_reader(path)
  field = lambda name, default=None: metadata(reader, f'tokenizer.ggml.{name}', default)
  if field('model') != 'gpt2':
    raise ValueError(
      f"{path}: 'tokenizer.ggml.model' is {field('model')!r}; only byte-level BPE, 'gpt2', is read "
      "here. Give the model's tokenizer.json or tokenizer.model as config.data.tokenizer"
    )
  cut = field('pre', 'default')
  if cut not in CUTS:
    raise ValueError(
      f"{path}: 'tokenizer.ggml.pre' {cut!r} is not known; {nearest(cut, CUTS)}. Give the model's "
      'tokenizer.json as config.data.tokenizer'
    )
  pieces, types_ = field('tokens'), field('token_type', [])
  merges = [tuple(merge.split(' ')) for merge in field('merges')]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
  tokenizer.pre_tokenizer = _pre_tokenizer(CUTS[cut])
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
    added = [piece for piece, found in zip(pieces, types_) if found == kind]
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([tokenizers.AddedToken(piece, special=special, normalized=False) for piece in added])
  return json.dumps(json.loads(tokenizer.to_str())), field('eos_token_id')


def _pre_tokenizer(cut: str | None):
  from tokenizers import Regex, pre_tokenizers

  if cut is None:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)
  if cut == 'digits':  # Each digit alone.
    parts = [pre_tokenizers.Digits(individual_digits=True)]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
  split = pre_tokenizers.Split(Regex(cut), 'isolated', invert=False)
  bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([split, bytes_])
