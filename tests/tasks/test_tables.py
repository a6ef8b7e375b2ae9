"""Rows of published files become the published prompts, letter by letter."""

import json
import sys
import types

import pytest

from memjax import tasks
from memjax.tasks import rows

NL = '\n'


def only(task, row, path):
  path.write_text(json.dumps(row) + NL)
  (found,) = tasks.read(tasks.find(task), str(path))
  return found


# Task, row, the whole text with every option, the right option: as MeZO's code prints them.
PUBLISHED = [
  ('sst2', dict(sentence='a fine film ', label=1), 'a fine film It was {}', ('terrible', 'great')),
  (
    'rte',
    dict(premise='P.', hypothesis='H.', label=1),
    'P.\nDoes this mean that "H." is true? Yes or No?\n{}',
    ('Yes', 'No'),
  ),
  (
    'cb',
    dict(premise='P.', hypothesis='H', label='contradiction'),
    'Suppose P. Can we infer that "H"? Yes, No, or Maybe?\n{}',
    ('Yes', 'No', 'Maybe'),
  ),
  (
    'boolq',
    dict(passage='P.', question='is it so', label=True),
    'P. Is it so?\n{}',
    ('No', 'Yes'),
  ),
  (
    'wic',
    dict(word='bank', sentence1='A.', sentence2='B.', label=True),
    'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA.\nB.\n{}',
    ('No', 'Yes'),
  ),
  (
    'wsc',
    dict(text='Bo saw Al. He ran.', target=dict(span1_text='Bo', span2_text='He'), label=True),
    'Bo saw Al. He ran.\nIn the previous sentence, does the pronoun "he" refer to Bo? Yes or No?'
    '\n{}',
    ('No', 'Yes'),
  ),
  (
    'multirc',
    dict(paragraph='T.', question='Q?', answer='A', label=1),
    'T.\nQuestion: Q?\nI found this answer "A". Is that correct? Yes or No?\n{}',
    ('No', 'Yes'),
  ),
  (
    'copa',
    dict(premise='It rained. ', question='effect', choice1='I ran.', choice2='The sun.', label=1),
    'It rained so {}',
    ('I ran.', 'the sun.'),
  ),
  (
    'record',
    dict(
      passage='Text.\n@highlight\nOne\n@highlight\nTwo',
      query='Then @placeholder left',
      entities=['Al', 'Bo'],
      answers=['Bo'],
    ),
    'Text.\n- One\n- Two\n- Then {} left',
    ('Al', 'Bo'),
  ),
  (
    'squad',
    dict(title='T', context='C', question=' Q? ', answers={'text': ['a', 'b']}),
    'Title: T\nContext: C\nQuestion: Q?\nAnswer: {}\n',
    ('a',),
  ),
  (
    'drop',
    dict(passage='P', question='Q?', answers_spans={'spans': ['3', 'x', '3']}),
    'Passage: P\nQuestion: Q?\nAnswer: {}\n',
    ('3',),
  ),
]


@pytest.mark.parametrize(('name', 'row', 'text', 'words'), PUBLISHED, ids=[p[0] for p in PUBLISHED])
def test_prompts_are_the_published_ones(name, row, text, words, tmp_path):
  found = only(name, row, tmp_path / 'a.jsonl')
  assert [found.prompt + option for option in found.options] == [text.format(w) for w in words]
  # A prompt ends in no blank: the blank is part of the option, as tokenizers want it.
  assert not found.prompt.endswith(' ')
  assert found.right == ((1,) if len(words) > 1 else (0,))


def test_every_task_says_its_prompt_from_its_own_fields(tmp_path):
  fields = dict.fromkeys(
    [field for task in tasks.TASKS.values() for field in (*task.fields(), *task.texts)], 'w'
  )
  others = dict(span2_text='W', choice1='a', choice2='b', query='@placeholder', entities=['a'])
  for name, task in tasks.TASKS.items():
    row = {**fields, **others, 'label': 0, 'output': 'o', 'answers': ['a']}
    found = only(name, row, tmp_path / 'a.jsonl')
    assert found.options
    assert len(found.texts) == len(task.texts)


def test_nested_files_are_the_flat_ones(tmp_path):
  question = dict(question='Q?', answers=[dict(text='A', label=1), dict(text='B', label=0)])
  nested = dict(passage=dict(text='T.', questions=[question]))
  (tmp_path / 'm.jsonl').write_text(json.dumps(nested))
  first, second = tasks.read(tasks.find('multirc'), str(tmp_path / 'm.jsonl'))
  assert (first.label, second.label) == (1, 0)
  assert first.prompt.startswith('T.\nQuestion: Q?\nI found this answer "A"')

  article = dict(
    title='T',
    paragraphs=[dict(context='C', qas=[dict(question='Q?', answers=[dict(text='a')])])],
  )
  (tmp_path / 's.json').write_text(json.dumps({'data': [article]}))
  (found,) = tasks.read(tasks.find('squad'), str(tmp_path / 's.json'))
  assert (found.prompt, found.label) == ('Title: T\nContext: C\nQuestion: Q?\nAnswer:', ('a',))

  answer = dict(number='', date={}, spans=['Al', 'Bo'])
  pair = dict(question='Who?', answer=answer, validated_answers=[answer, dict(number='2')])
  (tmp_path / 'd.json').write_text(json.dumps({'x': dict(passage='P', qa_pairs=[pair])}))
  (found,) = tasks.read(tasks.find('drop'), str(tmp_path / 'd.json'))
  assert found.label == (('Al', 'Bo'), '2')

  passage = dict(text='Al met Bo.', entities=[dict(start=0, end=1), dict(start=7, end=8)])
  qas = [dict(query='@placeholder left', answers=[dict(text='Bo')])]
  found = only('record', dict(passage=passage, qas=qas), tmp_path / 'r.jsonl')
  assert (found.options, found.right) == ((' Al left', ' Bo left'), (1,))


def test_tsv_has_fields_in_its_first_line_or_the_tasks_own(tmp_path):
  (tmp_path / 'm.tsv').write_text('Quality\t#1 ID\t#1 String\t#2 String\n1\t7\t"A\tB\n')
  (found,) = tasks.read(tasks.find('mrpc'), str(tmp_path / 'm.tsv'))
  assert (found.texts, found.label) == (('"A', 'B'), 1)
  (tmp_path / 'c.tsv').write_text('gj04\t0\t*\tBad this is.\ngj04\t1\t\tFine.\n')
  found = tasks.read(tasks.find('cola'), str(tmp_path / 'c.tsv'))
  assert [(e.texts, e.label) for e in found] == [(('Bad this is.',), 0), (('Fine.',), 1)]


def test_a_number_keeps_its_value_and_says_the_nearest_word(tmp_path):
  row = dict(sentence1='a', sentence2='b', score='3.6')
  found = only('stsb', row, tmp_path / 'a.jsonl')
  assert (found.label, found.options[found.right[0]]) == (3.6, '4')


def test_pairs_without_agreement_are_left_out(tmp_path):
  lines = [dict(premise='a', hypothesis='b', gold_label=x) for x in ('-', 'neutral')]
  (tmp_path / 'a.jsonl').write_text(NL.join(map(json.dumps, lines)))
  (found,) = tasks.read(tasks.find('snli'), str(tmp_path / 'a.jsonl'))
  assert found.label == 1


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('{"sentence": "x", "label": 2}', r"a\.jsonl, line 2: field 'label' is 2, outside the range"),
    ('{"sentence": "x", "label": -1}', 'line 2.*-1.*neither trained nor'),
    ('{"sentence": "x", "label": "good"}', "line 2: field 'label' is 'good', but labels"),
    ('{"sentence": "x"}', "line 2: no field 'label', which task 'sst2' reads; it has sentence"),
    ('{"label": 0}', "line 2: no field 'sentence'"),
    ('[1]', 'line 2: expected a JSON object'),
    ('{"sentence', 'line 2: not JSON'),
  ],
)
def test_a_bad_row_is_named_by_file_line_and_field(text, said, tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"sentence": "fine", "label": 1}\n' + text)
  with pytest.raises(ValueError, match=said):
    tasks.read(tasks.find('sst2'), str(path))


def test_a_file_that_is_empty_absent_or_foreign_is_refused(tmp_path):
  (tmp_path / 'a.jsonl').write_text(NL)
  with pytest.raises(ValueError, match=r'a\.jsonl: an empty split'):
    tasks.read(tasks.find('sst2'), str(tmp_path / 'a.jsonl'))
  with pytest.raises(ValueError, match='no such file'):
    tasks.read(tasks.find('sst2'), str(tmp_path / 'b.jsonl'))
  (tmp_path / 'a.csv').write_text('x')
  with pytest.raises(ValueError, match=r"not from '\.csv'"):
    tasks.read(tasks.find('sst2'), str(tmp_path / 'a.csv'))
  (tmp_path / 'r.jsonl').write_text('{"passage": 3, "qas": [{}]}')
  with pytest.raises(ValueError, match="line 1: not a row of task 'record'"):
    tasks.read(tasks.find('record'), str(tmp_path / 'r.jsonl'))


def test_an_unknown_task_names_the_nearest():
  with pytest.raises(ValueError, match="the nearest is 'sst2'"):
    tasks.find('sst-2')


class _Label:
  def int2str(self, value):
    return ['NUM', 'DESC'][value]


def test_tensorflow_datasets_are_read_by_the_names_of_their_labels(monkeypatch, tmp_path):
  """Their TREC numbers its labels otherwise; a fake library stands in for the real one."""
  folder = tmp_path / 'trec' / '1.0.0'
  folder.mkdir(parents=True)
  (folder / 'dataset_info.json').write_text('{}')

  class Rows(list):
    dataset_info = types.SimpleNamespace(features={'label-coarse': _Label()})

  asked = []

  def as_data_source(split):
    asked.append(split)
    return Rows([{'text': b'How far?', 'label-coarse': 0}, {'text': b'What?', 'label-coarse': 1}])

  builder = types.SimpleNamespace(as_data_source=as_data_source)
  fake = types.SimpleNamespace(builder_from_directory=lambda directory: builder)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', fake)
  found = tasks.read(tasks.find('trec'), f'tfds:trec@{tmp_path}', 'test')
  assert [e.label for e in found] == [5, 0]
  assert found[0].prompt.startswith('How far?\nWhat does')
  assert asked == ['test']


def test_tensorflow_datasets_that_are_not_there_say_what_to_do(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(
    ValueError, match=r'tfds:trec: needs TensorFlow Datasets.*config\.task\.train'
  ):
    list(rows._tfds('tfds:trec', 'train'))
