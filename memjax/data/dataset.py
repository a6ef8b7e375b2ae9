"""`load`: from a source's name to sequences of tokens, split and cached."""

import dataclasses
import pathlib

from memjax.data.cache import fingerprint, token_streams
from memjax.data.packing import Split
from memjax.data.sources import open_first
from memjax.data.tokenizers import Tokenizer, open_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Sequences to train and to validate on, and where they came from.

  Attributes:
    train: Whole sequences only; the last tokens, fewer than a sequence, are left out.
    validation: Every token, the last sequence padded with weight 0.
    tokenizer: Has `encode(str)`, `decode(list of int)`, `vocab_size`, `eos_id`.
    source: The scheme string that was used.
    missing: A sentence for each earlier source that was not available: what was missing and how to
      get it.
    fingerprint: Of the tokens of both splits.
  """

  train: Split
  validation: Split
  tokenizer: Tokenizer
  source: str
  missing: tuple[str, ...]
  fingerprint: str

  def counts(self) -> tuple[int, int, str]:
    """Returns how much there is to train and to validate on, and of what."""
    return self.train.num_tokens, self.validation.num_tokens, 'tokens'


def load(
  sources,
  tokenizer,
  seq_len,
  *,
  vocab_size,
  cache_dir,
  seed=0,
  validation_fraction=0.02,
  max_tokens=None,
):
  """Loads the first available source as training and validation sequences.

  The first load reads the text twice with 'bpe' (to train it, to encode it) and once otherwise;
  later loads map the cached tokens. Nothing is downloaded. Documents are joined with the
  end-of-document token and cut in sequences; a sequence may hold parts of several
  documents. Documents of white space alone are passed over.

  Args:
    sources: Scheme strings, tried in order: 'stdlib', 'text:GLOB', 'jsonl:GLOB:FIELD',
      'tfds:NAME[@DATA_DIR]'; see `memjax.data.sources.open_first`.
    tokenizer: 'bpe' (trained on the source to `vocab_size` pieces), 'bytes', the path of a
      `tokenizer.json`, or the path of a SentencePiece `.model`.
    seq_len: Tokens a sequence.
    vocab_size: Rows of the model's embedding; every token id is below it.
    cache_dir: Directory for tokens (2 bytes each, 4 beyond 65,536 pieces) and trained tokenizers.
      Processes may share it.
    seed: Seed of the train/validation split. The order of training examples has its own, in
      `Split.rows`.
    validation_fraction: Fraction of documents to validate on, between 0 and 1. Copies of a text are
      on one side. One document at least, if there are two.
    max_tokens: Tokens to take from the front of the source, both splits together; None for all.

  Returns:
    A `Dataset`.

  Raises:
    ValueError: for an unknown scheme or tokenizer; when no source is available, listing how to get
      each; when a file cannot be read as text, or `cache_dir` not be written; when token ids do not
      fit in `vocab_size`; when the training split is shorter than one sequence, or there is nothing
      to validate on.
  """
  if seq_len < 1:
    raise ValueError(f'seq_len={seq_len}; need at least 1')
  if not 0 < validation_fraction < 1:
    raise ValueError(f'validation_fraction={validation_fraction}; need a number between 0 and 1')
  if max_tokens is not None and max_tokens < 1:
    raise ValueError(f'max_tokens={max_tokens}; need at least 1, or None for all')
  schemes = [sources] if isinstance(sources, str) else list(sources)
  source, missing = open_first(schemes)
  cache_dir = pathlib.Path(cache_dir).expanduser()
  opened = open_tokenizer(tokenizer, source, vocab_size=vocab_size, cache_dir=cache_dir)
  streams = token_streams(
    source,
    opened,
    vocab_size=vocab_size,
    cache_dir=cache_dir,
    seed=seed,
    validation_fraction=validation_fraction,
    max_tokens=max_tokens,
  )
  if len(streams['train']) <= seq_len:
    raise ValueError(
      f'{source.scheme}: the train split has {len(streams["train"]) - 1} tokens, less than one '
      f'sequence of {seq_len}; use more text, a shorter seq_len, or another validation_fraction'
    )
  if len(streams['validation']) < 2:
    raise ValueError(
      f'{source.scheme}: the validation split has no tokens, because it takes whole documents and '
      'there is only one; add another'
    )
  return Dataset(
    train=Split(streams['train'], seq_len, keep_partial=False),
    validation=Split(streams['validation'], seq_len, keep_partial=True),
    tokenizer=opened,
    source=source.scheme,
    missing=missing,
    fingerprint=f'{fingerprint(streams["train"])}, {fingerprint(streams["validation"])}',
  )
