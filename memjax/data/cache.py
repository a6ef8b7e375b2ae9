"""Documents become two files of tokens, once; later loads map them into memory.

A cache entry is a directory `tokens-<key>` with `train.bin` and `validation.bin` (little-endian
uint16 or uint32) and `meta.json`. It appears by a rename, so it is whole or absent: after a kill
(which may leave a hidden temporary directory), and when several processes write it at once. An
entry that is not what `meta.json` says of it is written anew.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import uuid
import zlib

import numpy as np
from absl import logging

from memjax.data import tokenizers
from memjax.data.files import sync, writing

FORMAT = 2  # Raise it when entries are written differently, so that old ones are not read.
SPLITS = ('train', 'validation')
BLOCK, BLOCKS = 2**20, 256  # Bytes that a fingerprint reads at a place, and how many places.
CHUNK_CHARS = 2**20  # Text encoded at a time: keeps all cores busy, takes little memory.


def token_streams(
  source, tokenizer, *, vocab_size, cache_dir, seed, validation_fraction, max_tokens
):
  """Returns {'train': stream, 'validation': stream}, memory-mapped; tokenises what is not cached.

  A document is in the validation split if a hash of (seed, its text) falls below
  `validation_fraction`: a pure function, so the split is the same everywhere, and two copies of a
  text are on the same side. Where all are above, the lowest is to validate on.

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
    ValueError: when the source has no text; when a token does not fit in the model's embedding;
      when `cache_dir` cannot be written.
  """
  decides = [FORMAT, source.identity, tokenizer.identity, seed, validation_fraction, max_tokens]
  key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
  entry = cache_dir / f'tokens-{key[:16]}'
  meta = _sound_meta(entry)
  if meta is None:
    numbered = lambda: _numbered(_encoded(source.documents(), tokenizer), seed, max_tokens)
    meta = _write_entry(entry, numbered, validation_fraction, tokenizer)
  if not meta['documents']:
    raise ValueError(f'{source.scheme}: the files hold no text; add some, or name another source')
  tokenizers.check_vocab(meta['largest_id'], vocab_size, f'the text of {source.scheme}')
  return {name: _map(entry / f'{name}.bin', meta['dtype']) for name in SPLITS}


def fingerprint(stream):
  """Returns the bytes of an array and a CRC-32, as a string: of all of them, or beyond 256 MiB of
  256 blocks over its whole length, so that an array of any size takes a fraction of a second.
  """
  data = stream.view(np.uint8)
  crc = 0
  for start in range(0, data.size, max(BLOCK, data.size // BLOCKS)):
    crc = zlib.crc32(data[start : start + BLOCK], crc)
  return f'{data.size} {crc:08x}'


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


def _numbered(encoded, seed, max_tokens):
  """Yields (number in [0, 1), token ids) until `max_tokens` have been given out."""
  left = sys.maxsize if max_tokens is None else max_tokens
  for document, ids in encoded:
    yield _uniform(document, seed), ids[:left]
    left -= len(ids)
    if left <= 0:
      return


def _uniform(document, seed):
  """A number in [0, 1) that only the text and the seed decide."""
  data = f'{seed} {document}'.encode('utf-8', errors='surrogatepass')
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'little') / 2**64


def _sound_meta(entry):
  """Returns what `meta.json` says; None without an entry, or of one that is something else."""
  if not entry.exists():
    return None
  try:
    meta = json.loads((entry / 'meta.json').read_text())
    if meta['fingerprints'] != _fingerprints(entry):
      raise ValueError('its tokens are not those that were written')
  except (OSError, ValueError, KeyError, TypeError) as error:
    logging.warning('%s is damaged (%r); making its tokens anew', entry, error)
    return None
  return meta


def _fingerprints(entry):
  return {name: fingerprint(_map(entry / f'{name}.bin', np.uint8)) for name in SPLITS}


def _write_entry(entry, numbered, validation_fraction, tokenizer):
  """Writes an entry and returns its `meta.json`; `numbered()` yields (number, token ids)."""
  dtype = '<u2' if tokenizer.vocab_size <= 2**16 else '<u4'
  temporary = entry.with_name(f'.{entry.name}.{uuid.uuid4().hex}')
  write = lambda below: _write_tokens(temporary, numbered(), below, tokenizer.eos_id, dtype)
  try:
    with writing(temporary):
      temporary.mkdir(parents=True)
      meta, lowest, highest = write(validation_fraction)
      if validation_fraction <= lowest < highest:  # Too few documents to leave it to chance.
        meta, _, _ = write(math.nextafter(lowest, 1))
      meta |= {'dtype': dtype, 'fingerprints': _fingerprints(temporary)}
      (temporary / 'meta.json').write_text(json.dumps(meta))
      for path in (*temporary.iterdir(), temporary):
        sync(path)
      _publish(temporary, entry)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return meta


def _write_tokens(directory, numbered, below, eos_id, dtype):
  """Writes each document's tokens to the file of its split: validation for numbers `below`.

  Returns:
    What `meta.json` says of them, the lowest and the highest number.
  """
  documents, largest_id, lowest, highest = 0, eos_id, 1.0, 0.0
  with contextlib.ExitStack() as stack:
    files = {n: stack.enter_context(open(directory / f'{n}.bin', 'wb')) for n in SPLITS}
    for file in files.values():
      # The first document, too, is predicted from the end of another one.
      file.write(np.array([eos_id], dtype).tobytes())
    for number, ids in numbered:
      documents += 1
      largest_id = max(largest_id, max(ids))
      lowest, highest = min(lowest, number), max(highest, number)
      files['validation' if number < below else 'train'].write(np.array(ids, dtype).tobytes())
  return {'documents': documents, 'largest_id': largest_id}, lowest, highest


def _publish(temporary, entry):
  """Renames a finished entry into its place, where there may be a damaged one."""
  if entry.exists() and _sound_meta(entry) is None:
    shutil.rmtree(entry, ignore_errors=True)
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
