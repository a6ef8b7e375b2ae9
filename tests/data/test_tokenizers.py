"""Tokenizers round-trip text, train deterministically, and give no id that the model lacks."""

import itertools
import json
import pathlib

import pytest

from memjax.data import tokenizers
from memjax.data.sources import Source, open_first
from memjax.data.tokenizers import END_OF_TEXT, open_tokenizer, train_bpe

TEXT = 'def load(path):\n  return open(path)  # naïve — 日本語 🙂\n'


def corpus(texts=(TEXT,)):
  return Source('test', lambda: iter(texts), 'identity')


@pytest.fixture(scope='module')
def library():
  """The first 300 documents of the standard library."""
  documents = open_first(['stdlib'])[0].documents()
  return [next(documents) for _ in range(300)]


def spm_model(tmp_path, size=300):
  import sentencepiece

  model = tmp_path / 'spm.model'
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([TEXT] * 20),
    model_writer=model.open('wb'),
    vocab_size=size,
    model_type='bpe',
    byte_fallback=True,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return model


@pytest.mark.parametrize('name', ['bytes', 'bpe'])
@pytest.mark.parametrize('text', [TEXT, '', 'a', '    x\r\n\t', f'spells {END_OF_TEXT} out'])
def test_round_trip(tmp_path, name, text):
  tokenizer = open_tokenizer(name, corpus(), vocab_size=300, cache_dir=tmp_path)
  ids = tokenizer.encode(text)
  assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
  assert tokenizer.eos_id not in ids
  assert tokenizer.encode_batch([text, 'x']) == [ids, tokenizer.encode('x')]
  assert all(i <= tokenizer.largest_id < 300 for i in ids)


def test_golden_bytes(tmp_path):
  tokenizer = open_tokenizer('bytes', corpus(), vocab_size=257, cache_dir=tmp_path)
  assert tokenizer.encode('aé') == [97, 0xC3, 0xA9]
  assert (tokenizer.eos_id, tokenizer.vocab_size) == (256, 257)


def test_bpe_training_is_deterministic(library):
  first = json.loads(train_bpe(iter(library), 2000))
  assert len(first['model']['vocab']) == 2000
  assert first == json.loads(train_bpe(iter(library), 2000))


def test_bpe_is_trained_once_and_cached(tmp_path):
  reads = []
  source = corpus()._replace(documents=lambda: reads.append(1) or iter([TEXT]))
  first = open_tokenizer('bpe', source, vocab_size=280, cache_dir=tmp_path)
  again = open_tokenizer('bpe', source, vocab_size=280, cache_dir=tmp_path)
  assert len(reads) == 1
  assert first.identity == again.identity
  assert first.encode(TEXT) == again.encode(TEXT)
  open_tokenizer('bpe', source, vocab_size=290, cache_dir=tmp_path)
  open_tokenizer('bpe', source._replace(identity='new'), vocab_size=280, cache_dir=tmp_path)
  assert len(reads) == 3
  assert len(list(tmp_path.iterdir())) == 3  # No temporary files are left.


def test_bpe_reads_a_bounded_sample(monkeypatch):
  monkeypatch.setattr(tokenizers, 'SAMPLE_CHARS', 10 * len(TEXT))
  read = []
  train_bpe(itertools.takewhile(lambda _: not read.append(1), itertools.repeat(TEXT)), 260)
  assert len(read) == 10


def test_tokenizer_json_of_a_t5_kind_needs_no_rows_for_its_extra_ids(tmp_path):
  # Like T5: pieces below 300, an end token among them, and special ids past them.
  content = json.loads(train_bpe(iter([TEXT]), 300))
  size = len(content['model']['vocab'])
  content['added_tokens'] += [
    {**content['added_tokens'][0], 'id': size + i, 'content': f'<extra_id_{i}>'} for i in range(100)
  ]
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(content))
  tokenizer = open_tokenizer(str(path), corpus(), vocab_size=size, cache_dir=tmp_path)
  assert (tokenizer.vocab_size, tokenizer.largest_id) == (size + 100, size - 1)
  assert max(tokenizer.encode('an <extra_id_3> in the text')) < size
  with pytest.raises(
    ValueError, match=rf'up to {size - 1}, .* vocabulary of {size - 1}; set config'
  ):
    open_tokenizer(str(path), corpus(), vocab_size=size - 1, cache_dir=tmp_path)


def test_tokenizer_json_takes_its_end_token_from_the_config_beside_it(tmp_path):
  content = json.loads(train_bpe(iter([TEXT]), 300))
  content['added_tokens'][0]['content'] = '<my_end>'
  content['model']['vocab']['<my_end>'] = content['model']['vocab'].pop(END_OF_TEXT)
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match="name it as 'eos_token'"):
    open_tokenizer(str(path), corpus(), vocab_size=300, cache_dir=tmp_path)
  for named in ('<my_end>', {'content': '<my_end>'}):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': named}))
    assert open_tokenizer(str(path), corpus(), vocab_size=300, cache_dir=tmp_path).eos_id == 0


def test_sentencepiece(tmp_path):
  model = spm_model(tmp_path)
  tokenizer = open_tokenizer(str(model), corpus(), vocab_size=400, cache_dir=tmp_path)
  ids = tokenizer.encode('return open(path)')
  assert tokenizer.decode([*ids, tokenizer.eos_id]) == 'return open(path)'
  assert tokenizer.eos_id == 2
  assert tokenizer.encode_batch(['return open(path)'] * 2) == [ids, ids]
  assert tokenizer.largest_id == tokenizer.vocab_size - 1
  with pytest.raises(ValueError, match='a vocabulary smaller than the data'):
    open_tokenizer(str(model), corpus(), vocab_size=200, cache_dir=tmp_path)


@pytest.mark.parametrize('name', ['bytes', 'bpe'])
def test_a_vocabulary_smaller_than_the_data_is_refused(tmp_path, name):
  with pytest.raises(
    ValueError, match=r'ids up to 256, the model has a vocab.*model_args.vocab to at least 257'
  ):
    open_tokenizer(name, corpus(), vocab_size=256, cache_dir=tmp_path)


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('bpee', "the nearest is 'bpe'"),
    ('byte', "the nearest is 'bytes'"),
    (str(pathlib.Path('absent') / 'tokenizer.json'), 'no such file'),
    ('absent.model', 'no such file'),
  ],
)
def test_an_unknown_tokenizer_is_corrected(tmp_path, name, said):
  with pytest.raises(ValueError, match=said):
    open_tokenizer(name, corpus(), vocab_size=300, cache_dir=tmp_path)


@pytest.mark.parametrize(
  ('name', 'text', 'said'),
  [
    ('tokenizer.json', '{"torn": ', r'tokenizer.json: not a tokenizer.json \(.*; replace'),
    ('bad.model', 'no protocol buffer', r'bad.model: not a SentencePiece model \(.*; replace'),
    ('tokenizer_config.json', '[', r'tokenizer_config.json: not a JSON object \(.*; replace'),
  ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, name, text, said):
  (tmp_path / 'tokenizer.json').write_text(train_bpe(iter([TEXT]), 300))
  (tmp_path / name).write_text(text)
  opened = name if name.endswith('.model') else 'tokenizer.json'
  with pytest.raises(ValueError, match=said):
    open_tokenizer(str(tmp_path / opened), corpus(), vocab_size=300, cache_dir=tmp_path)
