"""Rows of published files become the published prompts, letter by letter."""

import gzip
import json
import sys
import types

import numpy as np
import pytest

from memjax import tasks
from memjax.tasks import evaluation, rows

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
  for header, rest in (
    ('', 'gj04\t0\t*\tBad this is.\ngj04\t1\t\tFine.\n'),
    ('sentence\tlabel\n', 'Bad this is.\t0\n\nFine.\tacceptable\n'),
  ):
    (tmp_path / 'c.tsv').write_text(header + rest)
    found = tasks.read(tasks.find('cola'), str(tmp_path / 'c.tsv'))
    assert [(e.texts, e.label) for e in found] == [(('Bad this is.',), 0), (('Fine.',), 1)]
  long = 'long ' * 2**15  # More than `csv` takes in one field.
  (tmp_path / 'l.tsv').write_text(f'sentence\tlabel\n{long}\t1\n')
  assert len(tasks.read(tasks.find('sst2'), str(tmp_path / 'l.tsv'))) == 1


@pytest.mark.parametrize(
  ('name', 'file', 'text'),
  [
    ('sst5', 'a.csv', '3,"a fine, fine film"\n0,bad\n'),
    ('sst5', 'a.csv', '\ufefftext,label\n"a fine, fine film",3\n\nbad,0\n'),
    ('trec', 'a.label', 'HUM:ind a fine, fine film\nDESC:def bad\n'),
  ],
)
def test_files_of_sst5_and_trec_as_they_go_round(name, file, text, tmp_path):
  (tmp_path / file).write_text(text)
  found = tasks.read(tasks.find(name), str(tmp_path / file))
  assert [(e.texts, e.label) for e in found] == [(('a fine, fine film',), 3), (('bad',), 0)]


@pytest.mark.parametrize(
  ('field', 'labels'),
  [
    ('label', [0, 1, 2, 3, 4, 5]),
    ('coarse_label', [2, 1, 0, 3, 4, 5]),
    ('label-coarse', [0, 1, 2, 3, 5, 4]),
  ],
)
def test_trec_is_numbered_as_its_field_says(field, labels, tmp_path):
  """`label` as LM-BFF has it, `coarse_label` and `label-coarse` as `datasets` now and before."""
  path = tmp_path / 'a.jsonl'
  path.write_text(NL.join(json.dumps({'text': 'x', field: i}) for i in range(6)))
  assert [e.label for e in tasks.read(tasks.find('trec'), str(path))] == labels
  path.write_text(json.dumps({'text': 'x', field: 6}))
  with pytest.raises(ValueError, match="line 1: field 'label' is 6, outside the range"):
    tasks.read(tasks.find('trec'), str(path))


@pytest.mark.parametrize(
  ('name', 'row', 'label'),
  [
    ('squad', dict(title='T', context='C', question='Q', answers='Rome'), ('Rome',)),
    ('squad', dict(title='T', context='C', question='Q', answers={'text': 'Rome'}), ('Rome',)),
    ('drop', dict(passage='P', question='Q', answers='Rome'), ('Rome',)),
    ('drop', dict(passage='P', question='Q', answer=dict(spans='Rome')), ('Rome',)),
    ('drop', dict(passage='P', question='Q', answers_spans=dict(spans='Rome')), ('Rome',)),
    ('record', dict(passage='P', query='@placeholder', entities=['R', 'Rome'], answers='Rome'), 1),
    ('copa', dict(premise='P', question='effect', choice1='a', choice2='b', label='choice2'), 1),
  ],
)
def test_an_answer_may_be_a_text_on_its_own(name, row, label, tmp_path):
  assert only(name, row, tmp_path / 'a.jsonl').label == label


def test_questions_and_entities_are_scored_as_their_benchmarks_do(tmp_path):
  answers = [dict(text=text, label=label) for text, label in (('A', 1), ('B', 0))]
  questions = [dict(question='Q?', answers=answers, idx=i) for i in range(2)]
  nested = dict(passage=dict(text='T.', questions=questions), idx=7)
  (tmp_path / 'm.jsonl').write_text(json.dumps(nested))
  task = tasks.find('multirc')
  found = tasks.read(task, str(tmp_path / 'm.jsonl'))
  # The same question twice, of which one is answered wrongly.
  scores = evaluation.score(task, [1, 0, 1, 1], found)
  assert scores == {'accuracy': 0.75, 'f1': 0.8, 'group_accuracy': 0.5}
  row = dict(passage='P', query='@placeholder', entities=['New York', 'York'], answers=['York'])
  task, found = tasks.find('record'), only('record', row, tmp_path / 'r.jsonl')
  scores = evaluation.score(task, [0], [found])
  assert scores == {'accuracy': 0.0, 'token_f1': pytest.approx(2 / 3), 'exact_match': 0.0}


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
    ('{"sentence": "x", "label": [1]}', r"line 2: field 'label' is \[1\], but labels"),
    ('{"sentence": "x", "label": NaN}', "line 2: field 'label' is nan, but labels"),
    ('{"sentence": "x", "label": 0.5}', "line 2: field 'label' is 0.5, but labels"),
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
  (tmp_path / 'a.txt').write_text('x')
  with pytest.raises(ValueError, match=r"not from '\.txt'"):
    tasks.read(tasks.find('sst2'), str(tmp_path / 'a.txt'))


WHOLE = gzip.compress(b'{"sentence": "fine", "label": 1}', mtime=0)
# Task, file, what is in it, what is said of it.
DAMAGED = [
  ('record', 'r.jsonl', b'{"passage": 3, "qas": [{}]}', "line 1: not a row of task 'record'"),
  ('sst2', 'a.json', b'3', r'a\.json: expected a list of objects, not int'),
  ('sst2', 'a.jsonl.gz', WHOLE[:-9], r'a\.jsonl\.gz: not a whole \.gz file'),
  ('sst2', 'b.jsonl.gz', b'{"sentence": "fine"}', r'b\.jsonl\.gz: not a whole \.gz file'),
  ('sst2', 'a.csv', b'sentence,label\n' + b'x' * 2**18 + b',1', r'a\.csv, line 2: not CSV \(field'),
  ('sst2', 'a.tsv', b'sentence\tlabel\nx', r'a\.tsv, line 2: 1 columns, but they are sentence, l'),
  ('stsb', 'a.tsv', b'sentence1\tsentence2\tscore\na\tb\t70', "line 2: field 'label' is 70.*range"),
  ('stsb', 'a.tsv', b'sentence1\tsentence2\tscore\na\tb\tnan', "'label' is nan, outside the range"),
]


@pytest.mark.parametrize(('name', 'file', 'content', 'said'), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_named_with_what_is_wrong(name, file, content, said, tmp_path):
  (tmp_path / file).write_bytes(content)
  with pytest.raises(ValueError, match=said):
    tasks.read(tasks.find(name), str(tmp_path / file))


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'entities': []}, "line 1: field 'entities' is empty"),
    ({'answers': ['Cy']}, "line 1: none of field 'answers', Cy, is among 'entities'"),
    ({'answers': []}, 'line 1: .* is -1.*neither trained nor'),
  ],
)
def test_what_cannot_be_chosen_is_said(changes, said, tmp_path):
  row = dict(passage='P', query='@placeholder', entities=['Al', 'Bo'], answers=['Bo'])
  with pytest.raises(ValueError, match=said):
    only('record', row | changes, tmp_path / 'a.jsonl')


def test_an_unknown_task_names_the_nearest():
  with pytest.raises(ValueError, match="the nearest is 'sst2'"):
    tasks.find('sst-2')


# Of every task that TensorFlow Datasets has, the names of its labels there, in their order.
TFDS_NAMES = {
  'cola': ('unacceptable', 'acceptable'),
  'sst2': ('negative', 'positive'),
  'mrpc': ('not_equivalent', 'equivalent'),
  'qqp': ('not_duplicate', 'duplicate'),
  'mnli': ('entailment', 'neutral', 'contradiction'),
  'qnli': ('entailment', 'not_entailment'),
  'rte': ('entailment', 'not_entailment'),
  'wnli': ('not_entailment', 'entailment'),
  'cb': ('entailment', 'contradiction', 'neutral'),
  'boolq': ('False', 'True'),
  'wic': ('False', 'True'),
  'wsc': ('False', 'True'),
  'multirc': ('False', 'True'),
  'copa': ('choice1', 'choice2'),
  'trec': ('DESC', 'ENTY', 'ABBR', 'HUM', 'NUM', 'LOC'),
  'snli': ('entailment', 'neutral', 'contradiction'),
}


@pytest.fixture
def prepared(monkeypatch, tmp_path):
  """Returns a function that prepares rows as a dataset of the library, and the splits asked for."""
  tfds = pytest.importorskip('tensorflow_datasets')
  asked = []

  def prepare(name, features, given):
    folder = tmp_path / name / '1.0.0'
    folder.mkdir(parents=True)
    (folder / 'dataset_info.json').write_text('{}')

    class Rows(list):
      dataset_info = types.SimpleNamespace(features=tfds.features.FeaturesDict(features))

    as_data_source = lambda split: asked.append(split) or Rows(given)
    builder = types.SimpleNamespace(as_data_source=as_data_source)
    monkeypatch.setattr(tfds, 'builder_from_directory', lambda directory: builder)
    return f'tfds:{name}@{tmp_path}'

  return prepare, asked


@pytest.mark.parametrize('name', TFDS_NAMES)
def test_tensorflow_datasets_are_read_by_the_names_of_their_labels(name, prepared):
  tfds = pytest.importorskip('tensorflow_datasets')
  task, names = tasks.find(name), TFDS_NAMES[name]
  label = 'label-coarse' if name == 'trec' else 'label'
  others = {'span2_text', 'premise', 'question', 'choice1', 'choice2'}
  texts = {*task.fields(), *task.texts, *others} - {'prompt'}
  features = dict.fromkeys(texts, tfds.features.Text())
  features[label] = tfds.features.ClassLabel(names=names)
  given = [dict.fromkeys(texts, b'w') | {label: np.int64(i)} for i in range(len(names))]
  prepare, asked = prepared
  found = tasks.read(task, prepare(task.tfds, features, given), task.splits[1])
  # TREC alone is numbered otherwise there than here.
  order = [names.index(name) for name in task.names] if name == 'trec' else range(len(names))
  assert [found[i].label for i in order] == list(range(len(names)))
  assert asked == [task.splits[1]]


def test_a_split_of_a_tensorflow_dataset_may_be_named(prepared):
  tfds = pytest.importorskip('tensorflow_datasets')
  features = {'premise': tfds.features.Text(), 'hypothesis': tfds.features.Text()}
  features['label'] = tfds.features.ClassLabel(names=TFDS_NAMES['mnli'])
  prepare, asked = prepared
  path = prepare('glue/mnli', features, [dict(premise=b'a', hypothesis=b'b', label=np.int64(2))])
  (found,) = tasks.read(tasks.find('mnli'), f'{path}#validation_mismatched', 'validation_matched')
  assert (asked, found.label) == (['validation_mismatched'], 2)


def test_tensorflow_datasets_that_are_not_there_say_what_to_do(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(
    ValueError, match=r'tfds:trec: needs TensorFlow Datasets.*config\.task\.train'
  ):
    list(rows._tfds('tfds:trec', 'train'))
