"""From files to a split, cached dataset."""

import json
import subprocess
import sys

import numpy as np
import pytest

from memjax import data
from memjax.data import cache


@pytest.fixture
def files(tmp_path):
  """A function that writes texts as one JSONL file and returns its scheme."""

  def write(texts, name='corpus.jsonl'):
    (tmp_path / name).write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    return f'jsonl:{tmp_path}/{name}:text'

  return write


@pytest.fixture
def load(tmp_path):
  def load(source, tokenizer='bytes', seq_len=4, **kwargs):
    kwargs = {
      'vocab_size': 300,
      'cache_dir': tmp_path / 'cache',
      'validation_fraction': 0.3,
    } | kwargs
    return data.load([source], tokenizer, seq_len, **kwargs)

  return load


def texts_of(dataset, split):
  """The documents of a split, read back through its sequences."""
  batch = split.eval_rows(0, len(split), 0, len(split))
  ids = [*batch['targets'][batch['weights'] == 1]]
  texts, text = [], []
  for i in ids:
    if i == dataset.tokenizer.eos_id:
      texts.append(dataset.tokenizer.decode(text))
      text = []
    else:
      text.append(int(i))
  return texts


WORDS = [f'document number {i}' for i in range(60)]


def test_every_document_is_in_one_split_in_order(files, load):
  dataset = load(files(WORDS), seq_len=1)  # With sequences of one token, nothing is left out.
  train, validation = texts_of(dataset, dataset.train), texts_of(dataset, dataset.validation)
  assert sorted(train + validation) == sorted(WORDS)
  assert train == [w for w in WORDS if w in train]
  assert 6 <= len(validation) <= 30  # 18 expected; four standard deviations are 14.
  assert dataset.train.num_tokens + dataset.validation.num_tokens == sum(len(w) + 1 for w in WORDS)
  assert dataset.missing == ()


def test_copies_of_a_text_do_not_leak(files, load):
  dataset = load(files(WORDS * 3), seq_len=1)
  assert not set(texts_of(dataset, dataset.train)) & set(texts_of(dataset, dataset.validation))


def test_split_depends_on_text_and_seed_only(files, load):
  first, more, other = (
    load(files(WORDS), seq_len=1),
    load(files(['a new one', *reversed(WORDS)], 'more.jsonl'), seq_len=1),
    load(files(WORDS), seq_len=1, seed=1),
  )
  validation = set(texts_of(first, first.validation))
  assert set(texts_of(more, more.validation)) - {'a new one'} == validation
  assert set(texts_of(other, other.validation)) != validation


def test_two_documents_are_one_to_train_and_one_to_validate_on(files, load):
  dataset = load(files(['one', 'two']), seq_len=1, validation_fraction=1e-9)
  train, validation = texts_of(dataset, dataset.train), texts_of(dataset, dataset.validation)
  assert sorted(train + validation) == ['one', 'two']
  assert len(train) == len(validation) == 1


def test_one_long_text_file_can_be_trained_on(load, tmp_path):
  (tmp_path / 'book.txt').write_text('It was a bright cold day in April.\n\n' * 2000)
  dataset = load(f'text:{tmp_path}/book.txt', seq_len=1024, validation_fraction=0.02)
  assert dataset.validation.num_tokens > 4000


def damage(entry, how):
  train, meta = entry / 'train.bin', entry / 'meta.json'
  data = train.read_bytes()
  if how == 'cut':
    train.write_bytes(data[: len(data) // 4 * 2])
  elif how == 'odd':
    train.write_bytes(data[:-1])
  elif how == 'empty':
    train.write_bytes(b'')
  elif how == 'other ids':
    train.write_bytes(np.full(len(data) // 2, 60_000, '<u2').tobytes())
  elif how == 'no meta':
    meta.unlink()
  else:
    meta.write_text(meta.read_text()[:-5])


@pytest.mark.parametrize('how', ['cut', 'odd', 'empty', 'other ids', 'no meta', 'torn meta'])
def test_a_damaged_entry_is_written_anew(files, load, tmp_path, caplog, how):
  scheme = files(WORDS)
  tokens = load(scheme).train.stream.copy()
  (entry,) = (tmp_path / 'cache').iterdir()
  damage(entry, how)
  np.testing.assert_array_equal(load(scheme).train.stream, tokens)
  assert f'{entry} is damaged' in caplog.text
  caplog.clear()
  load(scheme)
  assert not caplog.text


def test_a_fingerprint_reads_blocks_over_the_whole_length(monkeypatch):
  monkeypatch.setattr(cache, 'BLOCK', 4)
  monkeypatch.setattr(cache, 'BLOCKS', 8)
  zeros, ones = np.zeros(100, np.uint8), np.eye(100, dtype=np.uint8)
  whole = cache.fingerprint(zeros)
  assert [i for i in range(100) if cache.fingerprint(ones[i]) != whole] == [
    i for i in range(100) if i % 12 < 4
  ]
  assert cache.fingerprint(zeros[:-1]) != whole


def test_second_load_reads_no_text(files, load, monkeypatch):
  scheme = files(WORDS)
  first = load(scheme, 'bpe')
  monkeypatch.setattr(cache, '_write_entry', None)  # Calling it again would raise TypeError.
  again = load(scheme, 'bpe')
  np.testing.assert_array_equal(first.train.stream, again.train.stream)
  with pytest.raises(TypeError):
    load(scheme, 'bpe', max_tokens=400)
  with pytest.raises(TypeError):
    load(scheme, 'bytes')
  files([*WORDS, 'one more'])
  with pytest.raises(TypeError):
    load(scheme, 'bpe')


def test_two_writers_at_once_leave_one_whole_entry(files, load, monkeypatch, tmp_path):
  scheme = files(WORDS)
  publish = cache._publish

  def late(temporary, entry):
    monkeypatch.setattr(cache, '_publish', publish)
    load(scheme)  # Another process finishes first.
    publish(temporary, entry)

  monkeypatch.setattr(cache, '_publish', late)
  late_dataset, dataset = load(scheme), load(scheme)
  np.testing.assert_array_equal(late_dataset.train.stream, dataset.train.stream)
  assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_a_load_that_fails_midway_leaves_nothing(files, load, tmp_path):
  scheme = files(WORDS)
  path = tmp_path / 'corpus.jsonl'
  path.write_text(path.read_text() + 'bad\n')
  with pytest.raises(ValueError, match='line 61'):
    load(scheme)
  assert list((tmp_path / 'cache').iterdir()) == []


def test_a_kill_before_the_end_leaves_no_entry(files, load, tmp_path):
  scheme = files(WORDS)
  code = f"""
import os
from memjax import data
from memjax.data import cache
cache._publish = lambda *_: os._exit(9)  # As a SIGKILL would: no clean-up runs.
data.load({scheme!r}, 'bytes', 4, vocab_size=300, cache_dir='{tmp_path}/cache',
          validation_fraction=0.3)
"""
  assert subprocess.run([sys.executable, '-c', code]).returncode == 9
  assert [p.name.startswith('.tokens-') for p in (tmp_path / 'cache').iterdir()] == [True]
  assert load(scheme, seq_len=1).train.num_tokens > 0


def test_max_tokens_takes_the_front_and_stops_reading(files, load, tmp_path):
  path = tmp_path / 'corpus.jsonl'
  scheme = files(WORDS * 10_000)  # More than one chunk is encoded at a time.
  path.write_text(path.read_text() + 'bad')
  dataset = load(scheme, seq_len=1, max_tokens=500)
  assert dataset.train.num_tokens + dataset.validation.num_tokens == 500


def test_wide_ids_are_kept(files, load, tmp_path):
  dataset = load(files(WORDS))
  assert dataset.train.stream.dtype == np.uint16
  wide = dataset.tokenizer._replace(
    vocab_size=70_001,
    eos_id=70_000,
    identity='wide',
    encode_batch=lambda texts: [[65_536 + len(t)] for t in texts],
  )
  source = data.dataset.open_first([files(WORDS)])[0]
  streams = cache.token_streams(
    source,
    wide,
    vocab_size=70_001,
    cache_dir=tmp_path,
    seed=0,
    validation_fraction=0.3,
    max_tokens=None,
  )
  assert streams['train'].dtype == np.uint32
  assert streams['train'][:3].tolist() == [70_000, 65_536 + len(WORDS[0]), 70_000]


def test_a_cached_token_beyond_the_vocabulary_is_refused(files, load, tmp_path):
  source, tokenizer = data.dataset.open_first([files(WORDS)])[0], load(files(WORDS)).tokenizer
  with pytest.raises(ValueError, match=r'ids up to 256, the model has a vocabulary of 200'):
    cache.token_streams(
      source,
      tokenizer,
      vocab_size=200,
      cache_dir=tmp_path / 'cache',
      seed=0,
      validation_fraction=0.3,
      max_tokens=None,
    )


@pytest.mark.parametrize(
  ('texts', 'kwargs', 'said'),
  [
    (['', ' \n'], {}, 'hold no text'),
    (['short'], {'seq_len': 100}, 'split has . tokens, less than one sequence of 100'),
    (
      ['short'],
      {'validation_fraction': 1e-9},
      'the validation split has no tokens, .* only one; add another',
    ),
    (['short'] * 2, {'validation_fraction': 1e-9}, 'the validation split has no tokens'),
    (WORDS, {'cache_dir': '/proc/cache'}, r'/proc/cache.*; make room or .*config.data.cache_dir'),
    (WORDS, {'validation_fraction': 0}, 'need a number between 0 and 1'),
    (WORDS, {'seq_len': 0}, 'seq_len=0; need at least 1'),
    (WORDS, {'max_tokens': 0}, 'max_tokens=0; need at least 1'),
  ],
)
def test_what_cannot_work_is_refused(files, load, texts, kwargs, said):
  with pytest.raises(ValueError, match=said):
    load(files(texts), **kwargs)


def test_missing_sources_are_told(files, tmp_path):
  dataset = data.load(
    [f'text:{tmp_path}/none', files(WORDS)],
    'bytes',
    4,
    vocab_size=257,
    cache_dir=str(tmp_path / 'cache'),
    validation_fraction=0.3,
  )
  assert dataset.source == files(WORDS)
  assert 'no file matches' in dataset.missing[0]


def test_import_and_load_stay_light(tmp_path):
  (tmp_path / 'a.txt').write_text('text ' * 100)
  (tmp_path / 'b.txt').write_text('other ' * 100)
  code = f"""
import sys
from memjax import data
heavy = ('grain', 'tokenizers', 'sentencepiece', 'tensorflow_datasets', 'tensorflow')
assert not [m for m in heavy if m in sys.modules]
data.load('text:{tmp_path}/*.txt', 'bytes', 8, vocab_size=257, cache_dir='{tmp_path}/c',
          validation_fraction=0.02)
assert not [m for m in heavy if m in sys.modules]
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
