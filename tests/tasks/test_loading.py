"""What a config's task fields mean: files, draws and changes, and what is refused."""

import json
import types

import pytest

from memjax import config as config_lib
from memjax import tasks
from memjax.models import create
from memjax.tasks.spans import Spanned
from memjax.tasks.splits import Framed, Optioned, Prompted

LLAMA = types.SimpleNamespace(vocab=512)  # All that loading asks of a decoder.


def fields(**changes):
  c = config_lib.default().task.copy_and_resolve_references().unlock()
  c.update({'name': 'sst2', 'train': 'made_up:40', 'dev': 'made_up:4:40', **changes})
  return c


def load(tmp_path, model=LLAMA, tokenizer='bytes', seq_len=64, **changes):
  where = dict(vocab_size=512, cache_dir=tmp_path)
  return tasks.load(fields(**changes), model, tokenizer, seq_len, **where)


def test_splits_come_from_files_and_draws(tmp_path):
  data = load(tmp_path)
  assert [len(s) for s in (data.train, data.validation, data.test)] == [40, 4, 4]
  data = load(tmp_path, dev='', examples=10, dev_examples=5, test='made_up:9:50', test_examples=6)
  assert [len(s) for s in (data.train, data.validation, data.test)] == [10, 5, 6]
  data = load(tmp_path, dev='', shots=3)
  assert [len(s) for s in (data.train, data.validation, data.test)] == [6, 6, 6]
  assert data.counts() == (6, 6, 'examples')
  assert type(data.train) is Prompted
  assert type(load(tmp_path, loss='options').train) is Optioned


def test_a_test_needs_no_rows_to_train_on(tmp_path):
  where = dict(vocab_size=512, cache_dir=tmp_path)
  measured = lambda **changes: tasks.load_test(fields(**changes), LLAMA, 'bytes', 64, **where)
  data = measured(train='nowhere.jsonl', test='made_up:9:50', test_examples=6)
  assert [len(s) for s in (data.train, data.validation, data.test)] == [0, 0, 6]
  assert len(measured(train='nowhere.jsonl').test) == 4  # Those that develop.
  assert len(measured(dev='', dev_examples=7).test) == 7
  shown = measured(demonstrations=2, test='made_up:9').test.prompter.demonstrations
  assert shown == load(tmp_path, demonstrations=2).train.prompter.demonstrations
  with pytest.raises(ValueError, match=r'nowhere\.jsonl: no such file'):
    measured(train='nowhere.jsonl', demonstrations=2, test='made_up:9')


def test_a_fingerprint_is_of_the_examples_and_the_tokenizer(tmp_path):
  first = load(tmp_path).fingerprint
  assert load(tmp_path, test='made_up:9').fingerprint == first
  assert load(tmp_path, train='made_up:40:1').fingerprint != first
  assert load(tmp_path, tokenizer='bpe').fingerprint != first


def test_demonstrations_are_the_first_of_the_published_draw(tmp_path):
  data = load(tmp_path, demonstrations=2, examples=10, dev_examples=5, dev='')
  shown = data.train.prompter.demonstrations
  assert [e.texts for e in shown] == [e.texts for e in data.train.examples[:2]]


def test_a_tokenizer_may_be_trained_on_the_task(tmp_path):
  data = load(tmp_path, tokenizer='bpe')
  assert data.tokenizer.vocab_size <= 512
  assert data.train.prompter.row(data.train.examples[0], 0).tokens[0] == data.tokenizer.eos_id


def test_tokens_before_every_text_are_a_choice(tmp_path):
  first = lambda prefix: load(tmp_path, prefix=prefix).train.rows(0, 1, 0, 1, 0)['tokens'][0, 0]
  assert (first('auto'), first('7')) == (256, 7)
  assert first('none') < 128  # A letter.
  with pytest.raises(ValueError, match=r"config\.task\.prefix is '999'"):
    first('999')


def test_any_jsonl_with_a_template_is_a_task(tmp_path):
  rows = [dict(q=f'is {i} even', label=i % 2, text='no' if i % 2 else 'yes') for i in range(8)]
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  own = dict(name=f'jsonl:{path}', train='', template='{q}?', dev_examples=2, dev='')
  data = load(tmp_path, **own, words=('yes', 'no'))
  example = data.train.examples[0]
  assert example.prompt + example.options[1] == f'{example.prompt} no'
  assert data.task.metrics == ('accuracy',)
  data = load(tmp_path, **own, label='text', new_tokens=4)
  assert (data.task.kind, data.task.metrics) == ('generation', ('exact_match', 'token_f1'))
  assert data.train.examples[0].label in (('yes',), ('no',))
  with pytest.raises(ValueError, match=r'set config\.task\.template'):
    load(tmp_path, **own | {'template': ''})


def test_a_published_task_with_other_words(tmp_path):
  data = load(tmp_path, words=('bad', 'good'), template='{sentence} All in all it was')
  assert data.train.examples[0].options == (' bad', ' good')


def test_sources_of_instructions_are_numbered(tmp_path):
  data = load(tmp_path, name='instruct', new_tokens=8)
  assert data.train.sources == ('source 0', 'source 1')
  batch = data.train.eval_rows(0, 4, 0, 4)
  assert batch['source'].tolist() == [0, 1, 0, 1]


def test_an_encoder_gets_texts_and_the_tasks_head(tmp_path):
  small = dict(hidden=16, intermediate=16, heads=2, layers=1)
  wanted = tasks.head_fields(tasks.find('mnli'))
  assert wanted == {'task': 'classification', 'labels': 3}
  data = load(tmp_path, create('bert_tiny', **small, **wanted), name='mnli')
  assert type(data.train) is Framed
  assert set(data.train.rows(0, 2, 0, 2, 0)['labels'].tolist()) <= {0, 1, 2}
  with pytest.raises(ValueError, match=r'needs labels=3, but the model has 2.*model_args\.labels'):
    load(tmp_path, create('bert_tiny', **small), name='mnli')
  with pytest.raises(ValueError, match='asks for generation, which Bert has no head for'):
    load(tmp_path, create('bert_tiny', **small), name='drop')
  spans = create('bert_tiny', **small, **tasks.head_fields(tasks.find('squad')))
  assert type(load(tmp_path, spans, name='squad').train) is Spanned


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (dict(train='', name='sst5'), r"'sst5' is not in TensorFlow Datasets; name its files"),
    (dict(dev=''), r'nothing to measure on: name config\.task\.test'),
    (dict(train='made_up:x'), "write 'made_up:COUNT'"),
    (dict(train='made_up:0', dev=''), 'empty split'),
    (dict(name='sst22'), "nearest is 'sst2'"),
    (dict(name='squad'), r'config\.seq_len is 64, but an answer.*may take'),
  ],
)
def test_what_cannot_be_loaded_is_refused(tmp_path, changes, said):
  seq_len = 32 if changes.get('name') == 'squad' else 64
  with pytest.raises(ValueError, match=said.replace('64', str(seq_len))):
    load(tmp_path, seq_len=seq_len, **changes)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'task.loss': 'words'}, r"task\.loss 'words' does not exist"),
    ({'task.examples': -1}, 'it counts examples'),
    ({'task.shots': 16, 'task.examples': 10}, r'set config\.task\.examples=0'),
    ({'task.loss': 'options', 'step': 'layerwise'}, "config.step='whole_tree'"),
  ],
)
def test_fields_that_contradict_each_other_are_refused(changes, said):
  c = config_lib.default().unlock()
  c.task.name = 'sst2'
  c.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=said):
    config_lib.validate(c)
