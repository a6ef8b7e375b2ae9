"""Documents become two files of tokens, once; later loads map them into memory.

A cache entry is a directory `tokens-<key>` with `train.bin` and `validation.bin` (little-endian
uint16 or uint32) and `meta.json`. It appears by a rename, so it is whole or absent: after a kill
(which may leave a hidden temporary directory), and when several processes write it at once.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid

import numpy as np

from memjax.data import tokenizers

FORMAT = 1  # Raise it when entries are written differently, so that old ones are not read.
SPLITS = ('train', 'validation')
CHUNK_CHARS = 2**20  # Text encoded at a time: keeps all cores busy, takes little memory.


def token_streams(
  source, tokenizer, *, vocab_size, cache_dir, seed, validation_fraction, max_tokens
):
  """Returns {'train': stream, 'validation': stream}, memory-mapped; tokenises what is not cached.

  A document is in the validation split if a hash of (seed, its text) falls below
  `validation_fraction`: a pure function, so the split is the same everywhere, and two copies of a
  text are on the same side.

  Args:
    source: A `sources.Source`.
    tokenizer: A `tokenizers.Tokenizer`.
    vocab_size: Rows of the model's embedding.
    cache_dir: A pathlib.Path on a local or shared file system; an entry takes 2 bytes a token, 4
      beyond 65,536 pieces.
    seed: Seed of the split.
    validation_fraction: Fraction of documents in the validation split.
    max_tokens: Tokens to take from the front of the source, both splits together; None for all.

  Raises:
    ValueError: when the source has no text; when a token does not fit in the model's embedding.
  """
  decides = [FORMAT, source.identity, tokenizer.identity, seed, validation_fraction, max_tokens]
  key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
  entry = cache_dir / f'tokens-{key[:16]}'
  if not entry.exists():
    _write_entry(
      entry,
      _labelled(_encoded(source.documents(), tokenizer), seed, validation_fraction, max_tokens),
      tokenizer,
    )
  meta = json.loads((entry / 'meta.json').read_text())
  if not meta['documents']:
    raise ValueError(f'{source.scheme}: the files hold no text; add some, or name another source')
  tokenizers.check_vocab(meta['largest_id'], vocab_size, f'the text of {source.scheme}')
  return {name: _map(entry / f'{name}.bin', meta['dtype']) for name in SPLITS}


def _encoded(documents, tokenizer):
  """Yields (document, its token ids with the end-of-document token), a chunk of text at a time."""
  documents = (d for d in documents if d.strip())
  while chunk := list(_take_chars(documents, CHUNK_CHARS)):
    for document, ids in zip(chunk, tokenizer.encode_batch(chunk)):
      yield document, [*ids, tokenizer.eos_id]


def _take_chars(documents, chars):
  for document in documents:
    yield document
    chars -= len(document)
    if chars <= 0:
      return


def _labelled(encoded, seed, validation_fraction, max_tokens):
  """Yields (split name, token ids) until `max_tokens` have been given out."""
  left = sys.maxsize if max_tokens is None else max_tokens
  for document, ids in encoded:
    yield 'validation' if _uniform(document, seed) < validation_fraction else 'train', ids[:left]
    left -= len(ids)
    if left <= 0:
      return


def _uniform(document, seed):
  """A number in [0, 1) that only the text and the seed decide."""
  data = f'{seed} {document}'.encode('utf-8', errors='surrogatepass')
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little') / 2**64


def _write_entry(entry, labelled, tokenizer):
  dtype = '<u2' if tokenizer.vocab_size <= 2**16 else '<u4'
  temporary = entry.with_name(f'.{entry.name}.{uuid.uuid4().hex}')
  temporary.mkdir(parents=True)
  try:
    with contextlib.ExitStack() as stack:
      files = {n: stack.enter_context(open(temporary / f'{n}.bin', 'wb')) for n in SPLITS}
      meta = {'dtype': dtype, **_write_tokens(files, labelled, tokenizer.eos_id, dtype)}
    (temporary / 'meta.json').write_text(json.dumps(meta))
    _publish(temporary, entry)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _write_tokens(files, labelled, eos_id, dtype):
  """Writes each document's tokens to its split's file; returns what `meta.json` says of them."""
  documents, largest_id = 0, eos_id
  for file in files.values():
    # The first document, too, is predicted from the end of another one.
    file.write(np.array([eos_id], dtype).tobytes())
  for name, ids in labelled:
    documents += 1
    largest_id = max(largest_id, max(ids))
    files[name].write(np.array(ids, dtype).tobytes())
  return {'documents': documents, 'largest_id': largest_id}


def _publish(temporary, entry):
  try:
    os.rename(temporary, entry)
  except OSError:
    # Another process was first, with the same bytes; a directory that is not empty cannot be
    # renamed over.
    if not entry.exists():
      raise


def _map(path, dtype):
  # A plain view: slicing np.memmap objects costs more than reading the tokens.
  return np.memmap(path, dtype, mode='r').view(np.ndarray)
