"""The tokenizer inside a GGUF file, as the files of a Hugging Face folder."""

import json
import pathlib
import types
from typing import NamedTuple

from memjax.models.huggingface.gguf import metadata, open_reader
from memjax.naming import nearest

CONTROL, USER_DEFINED = 3, 4  # `tokenizer.ggml.token_type` of pieces that text is never cut into.
WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


class Cut(NamedTuple):
  """What becomes of text before pieces are merged."""

  pattern: str | None = None  # Of one word; None is GPT-2's.
  digits: bool = False  # Whether each digit stands alone.
  whole: bool = False  # Whether a word that is a piece is taken as it is, without merging.
  normalise: bool = False  # To Unicode's NFC.


# `tokenizer.ggml.pre` -> as in the models' own tokenizer.json.
CUTS = types.MappingProxyType(
  {
    'default': Cut(),
    'gpt-2': Cut(),
    'smollm': Cut(digits=True),
    'llama-bpe': Cut(WORDS, whole=True),
    'qwen2': Cut(WORDS.replace('{1,3}', ''), normalise=True),
  }
)


def tokenizer_files(path: pathlib.Path) -> dict[str, str]:
  """Returns the files that a Hugging Face folder has of the tokenizer: name -> text.

  Raises:
    ValueError: as `tokenizer_json`.
  """
  text, _ = tokenizer_json(path)
  reader = open_reader(path)
  pieces = metadata(reader, 'tokenizer.ggml.tokens')
  named = {
    f'{name}_token': metadata(reader, f'tokenizer.ggml.{name}_token_id') for name in ('bos', 'eos')
  }
  fields = {name: pieces[i] for name, i in named.items() if i is not None}
  template = metadata(reader, 'tokenizer.chat_template')
  fields |= {'chat_template': template} if template else {}
  fields |= {'tokenizer_class': 'PreTrainedTokenizerFast'}
  config = json.dumps(fields, indent=2, ensure_ascii=False) + '\n'
  return {'tokenizer.json': text, 'tokenizer_config.json': config}


def tokenizer_json(path: pathlib.Path) -> tuple[str, int]:
  """Returns the text of a `tokenizer.json`, and the id that ends a document.

  Raises:
    ImportError: without the package `gguf`.
    ValueError: for a file without a byte-level BPE or the end of a document, or one that cuts text
      in a way unknown here.
  """
  import tokenizers

  reader = open_reader(path)
  field = lambda name, default=None: metadata(reader, f'tokenizer.ggml.{name}', default)
  instead = "give the model's tokenizer.json or tokenizer.model as config.data.tokenizer"
  if field('model') != 'gpt2':
    raise ValueError(
      f"{path}: 'tokenizer.ggml.model' is {field('model')!r}, and only byte-level BPE, 'gpt2', is "
      f'read here; {instead}'
    )
  pre = field('pre', 'default')
  if pre not in CUTS:
    raise ValueError(
      f"{path}: 'tokenizer.ggml.pre' {pre!r} is not known; {nearest(pre, CUTS)}; {instead}"
    )
  if field('eos_token_id') is None:
    raise ValueError(f"{path}: 'tokenizer.ggml.eos_token_id' is missing; {instead}")
  cut, pieces, kinds = CUTS[pre], field('tokens'), field('token_type', [])
  model = tokenizers.models.BPE(
    vocab={piece: i for i, piece in enumerate(pieces)},
    merges=[tuple(merge.split(' ')) for merge in field('merges')],
    ignore_merges=cut.whole,
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = _pre_tokenizer(cut)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  if cut.normalise:
    tokenizer.normalizer = tokenizers.normalizers.NFC()
  for kind in (CONTROL, USER_DEFINED):
    special = kind == CONTROL
    added = [piece for piece, found in zip(pieces, kinds) if found == kind]
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([tokenizers.AddedToken(piece, special=special, normalized=False) for piece in added])
  if field('add_bos_token', False):
    first = pieces[field('bos_token_id')]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single=[first, '$A'],
      pair=[first, '$A', '$B'],
      special_tokens=[(first, field('bos_token_id'))],
    )
  return tokenizer.to_str(), field('eos_token_id')


def _pre_tokenizer(cut: Cut):
  from tokenizers import Regex
  from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

  parts = [Digits(individual_digits=True)] if cut.digits else []
  if cut.pattern is not None:
    parts.append(Split(Regex(cut.pattern), 'isolated', invert=False))
  gpt2 = cut.pattern is None
  return Sequence([*parts, ByteLevel(add_prefix_space=False, use_regex=gpt2)])
