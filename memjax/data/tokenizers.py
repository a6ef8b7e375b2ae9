"""Text to token ids and back: bytes, a BPE trained on the corpus, or a published tokenizer."""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from memjax.data.files import write_atomically
from memjax.naming import nearest

END_OF_TEXT = '<|endoftext|>'
END_TOKENS = (END_OF_TEXT, '</s>', '<|end_of_text|>', '<eos>', '<|im_end|>', '[SEP]')
# A BPE of this size changes little beyond some 64 M characters, and training has a bound.
SAMPLE_CHARS = 2**26


class Frame(NamedTuple):
  """Control tokens that a model expects around a text, or around two that it compares."""

  first: tuple[int, ...] = ()
  between: tuple[int, ...] = ()  # Between two texts.
  last: tuple[int, ...] = ()


class Tokenizer(NamedTuple):
  """What the rest of memjax asks of a tokenizer; text never becomes the end of a document."""

  encode: Callable[[str], list[int]]
  encode_batch: Callable[[list[str]], list[list[int]]]  # Uses all cores where the library can.
  decode: Callable[[list[int]], str]  # Leaves out control tokens.
  vocab_size: int  # Ids, the unused and the control tokens included.
  largest_id: int  # The largest id that text or the end of a document can become.
  eos_id: int  # Follows every document.
  identity: str  # Equal only for tokenizers that encode alike.
  frame: Frame = Frame()  # Around a text on its own; streams of documents do without.
  # Where the characters of each token that `encode` returns begin and end, where it can be told.
  spans: Callable[[str], list[tuple[int, int]]] | None = None
  control: frozenset[int] = frozenset()  # Ids that stand for no text, such as a document's end.


def open_tokenizer(name, source, *, vocab_size, cache_dir):
  """Opens or trains a tokenizer.

  Args:
    name: 'bytes'; 'bpe', which is trained on `source` to `vocab_size` pieces and kept in
      `cache_dir`; or the path of a `tokenizer.json`, a SentencePiece `.model`, or a `.gguf`.
    source: Corpus, a `sources.Source`; read for 'bpe' only.
    vocab_size: Rows of the model's embedding.
    cache_dir: Directory for trained tokenizers, a pathlib.Path.

  Raises:
    ValueError: for an unknown name, a file that is not there or is something else; when ids would
      not fit in the model's embedding; when `cache_dir` cannot be written.
  """
  if name == 'bytes':
    tokenizer = _bytes()
  elif name == 'bpe':
    tokenizer = _bpe(source, vocab_size, cache_dir)
  else:
    path = pathlib.Path(name).expanduser()
    if path.suffix not in OPENERS:
      raise ValueError(
        f'unknown tokenizer {name!r}; {nearest(name, ["bytes", "bpe"])}, the path of a '
        'tokenizer.json, or the path of a SentencePiece .model'
      )
    if not path.is_file():
      raise ValueError(
        f"tokenizer {name!r}: no such file; correct the path, or train one with 'bpe'"
      )
    tokenizer = OPENERS[path.suffix](path)
  check_vocab(tokenizer.largest_id, vocab_size, f'tokenizer {name!r}')
  return tokenizer


def check_vocab(largest_id, vocab_size, who):
  """Raises ValueError if `largest_id` has no row in an embedding of `vocab_size` rows.

  XLA clamps an index out of range, so without this check a model would train on wrong tokens and
  say nothing.
  """
  if largest_id >= vocab_size:
    raise ValueError(
      f'a vocabulary smaller than the data: {who} has token ids up to {largest_id}, the model has '
      f'a vocabulary of {vocab_size}; set config.model_args.vocab to at least {largest_id + 1}, or '
      "train a tokenizer that fits with config.data.tokenizer='bpe'"
    )


def _bytes():
  return Tokenizer(
    encode=lambda text: list(text.encode()),
    encode_batch=lambda texts: [list(text.encode()) for text in texts],
    decode=lambda ids: bytes(i for i in ids if i < 256).decode('utf-8', errors='replace'),
    vocab_size=257,
    largest_id=256,
    eos_id=256,
    identity='bytes',
    frame=_between_documents(256),
    spans=lambda text: [(i, i + 1) for i, c in enumerate(text) for _ in c.encode()],
  )


def _bpe(source, vocab_size, cache_dir):
  check_vocab(256, vocab_size, "tokenizer 'bpe', which starts from 256 bytes and an end,")
  key = hashlib.sha256(f'1 {source.identity} {vocab_size} {SAMPLE_CHARS}'.encode()).hexdigest()[:16]
  path = cache_dir / f'bpe-{vocab_size}-{key}.json'
  if not path.exists():
    write_atomically(path, lambda: train_bpe(source.documents(), vocab_size))
  opened = _tokenizer_json(path)
  return opened._replace(frame=_between_documents(opened.eos_id))


def _between_documents(eos_id):
  """Of models that we train: their documents begin after the end of another."""
  return Frame(first=(eos_id,), between=(eos_id,))


def train_bpe(documents, vocab_size):
  """Trains a byte-level BPE of at most `vocab_size` pieces on the first 64 M characters.

  The same documents give the same vocabulary, on any number of cores.

  Returns:
    The text of a `tokenizer.json`.
  """
  import tokenizers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT],
    # All 256 bytes, so that no text is unknown.
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_sample(documents), trainer)
  return tokenizer.to_str()


def _sample(documents):
  chars = 0
  for document in documents:
    yield document
    chars += len(document)
    if chars >= SAMPLE_CHARS:
      return


def _tokenizer_json(path):
  import tokenizers

  try:
    text = path.read_text(encoding='utf-8')
    tokenizer = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # The library raises nothing more special.
    raise ValueError(f'{path}: not a tokenizer.json ({error}); replace or remove it') from error
  return _hugging_face(tokenizer, text, lambda tokenizer: _end_of_text_id(tokenizer, path))


def _gguf(path):
  import tokenizers

  from memjax.models.huggingface.gguf_tokenizer import tokenizer_json

  text, eos_id = tokenizer_json(path)
  return _hugging_face(tokenizers.Tokenizer.from_str(text), text, lambda _: eos_id)


def _hugging_face(tokenizer, text, find_eos_id):
  # A document that spells '</s>' must not end itself; nor may the file cut or pad documents.
  tokenizer.encode_special_tokens = True
  tokenizer.no_truncation()
  tokenizer.no_padding()
  eos_id = find_eos_id(tokenizer)
  special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
  ids = set(tokenizer.get_vocab().values())

  def encode(text):
    return tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(texts):
    return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

  return Tokenizer(
    encode=encode,
    encode_batch=encode_batch,
    decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    vocab_size=max(ids) + 1,
    # T5's file has 100 special ids past its 32,000 pieces; a model needs no rows for what no text
    # becomes.
    largest_id=max((ids - special) | {eos_id}),
    eos_id=eos_id,
    identity=f'{eos_id} {hashlib.sha256(text.encode()).hexdigest()}',
    frame=_frame(tokenizer),
    spans=lambda text: tokenizer.encode(text, add_special_tokens=False).offsets,
    control=frozenset(special | {eos_id}),
  )


def _frame(tokenizer):
  """What the file puts around two texts, found by letting it do so."""
  pair = tokenizer.encode('a', 'b', add_special_tokens=True)
  parts, part = ([], [], []), 0
  for token, text in zip(pair.ids, pair.sequence_ids):
    if text is None:
      parts[part].append(token)
    else:
      part = text + 1
  return Frame(*map(tuple, parts))


def _end_of_text_id(tokenizer, path):
  """The token that a `tokenizer_config.json` beside the file names, else the first usual one."""
  names = END_TOKENS
  config = path.with_name('tokenizer_config.json')
  if config.exists():
    named = _read_object(config).get('eos_token')
    named = named.get('content') if isinstance(named, dict) else named
    names = (named, *names) if named else names
  for name in names:
    if (eos_id := tokenizer.token_to_id(name)) is not None:
      return eos_id
  raise ValueError(
    f"{path}: no end-of-document token among {', '.join(names)}; name it as 'eos_token' in {config}"
  )


def _read_object(path):
  try:
    return dict(json.loads(path.read_text(encoding='utf-8')))
  except (ValueError, TypeError) as error:
    raise ValueError(f'{path}: not a JSON object ({error}); replace or remove it') from error


def _sentencepiece(path):
  import sentencepiece

  try:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (RuntimeError, OSError) as error:
    raise ValueError(f'{path}: not a SentencePiece model ({error}); replace it') from error
  eos_id, size = processor.eos_id(), processor.get_piece_size()
  if eos_id < 0:
    raise ValueError(f'{path}: no end-of-document piece; train it without --eos_id=-1')
  control = frozenset(i for i in range(size) if processor.is_control(i))
  from_text = (i for i in range(size) if i not in control and not processor.is_unused(i))
  return Tokenizer(
    encode=processor.encode,
    encode_batch=processor.encode,
    decode=lambda ids: processor.decode([i for i in ids if i not in control]),
    vocab_size=size,
    largest_id=max(eos_id, *from_text),
    eos_id=eos_id,
    identity=hashlib.sha256(path.read_bytes()).hexdigest(),
    frame=Frame(first=(processor.bos_id(),)) if processor.bos_id() >= 0 else Frame(),
    control=control,
  )


OPENERS = {'.json': _tokenizer_json, '.model': _sentencepiece, '.gguf': _gguf}
