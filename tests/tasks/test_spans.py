"""Answers of encoders: where they lie in a row, in whichever window, and back to text."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import tasks
from memjax.data.tokenizers import Frame, open_tokenizer, train_bpe
from memjax.models import create
from memjax.tasks import spans

FIRST, BETWEEN, LAST = 257, 258, 259
CONTEXT = 'Der Zug hält in Köln, in Bonn und zuletzt in Mainz.'


def split(*rows, seq_len=32):
  tokenizer = open_tokenizer('bytes', None, vocab_size=260, cache_dir=None)
  tokenizer = tokenizer._replace(frame=Frame((FIRST,), (BETWEEN,), (LAST,)))
  task = tasks.find('squad')
  rows = [dict(title='T', context=CONTEXT, question='Wo?') | row for row in rows]
  examples = [tasks.example(task, r, 'row') for row in rows for r in task.prepare(row)]
  return spans.Spanned(examples, tokenizer=tokenizer, seq_len=seq_len)


@pytest.mark.parametrize('seq_len', [16, 24, 32, 128])
@pytest.mark.parametrize('answer', ['Der', 'Köln', 'Mainz.'])
def test_the_labels_are_the_ends_of_the_answer(answer, seq_len):
  data = split(dict(answers=answer), seq_len=seq_len)
  batch = data.batch([data.examples[0], None])
  (first, last), tokens = batch['labels'][0], batch['tokens'][0].tolist()
  assert data.tokenizer.decode(tokens[first : last + 1]) == answer
  end = tokens.index(LAST)
  between = tokens.index(BETWEEN)
  assert (tokens[0], data.tokenizer.decode(tokens[1:between])) == (FIRST, 'Wo?')
  assert batch['attention_mask'].sum(1).tolist() == [end + 1, 1]
  assert batch['token_types'][0].tolist() == [between < i <= end for i in range(seq_len)]
  assert batch['weights'].tolist() == [1, 0]


def test_windows_hold_all_of_the_context_each_place_twice_but_at_the_ends():
  data = split(dict(answers='Bonn'), seq_len=24)
  windows = data.windows(data.examples[0])
  count = [0] * len(CONTEXT)
  for window in windows:
    assert len(window.tokens) <= 24
    for start in {start for start, _ in window.spans}:
      count[start] += 1
  assert min(count) >= 1
  assert max(count[12:-12]) == 2


def test_where_the_answer_begins_is_taken_from_the_row():
  nested = dict(answers=[dict(text='in', answer_start=22)])
  columns = dict(answers=dict(text=['in'], answer_start=np.int32([22]).tolist()))
  for row, start in ((nested, 22), (columns, 22), (dict(answers='in'), 13)):
    data = split(row, seq_len=128)
    batch = data.batch(data.examples)
    # The question's frame, and a letter of two bytes before each.
    begin = 5 + len(CONTEXT[:start].encode())
    assert batch['labels'].tolist() == [[begin, begin + 1]]


def test_an_answer_is_the_best_span_of_all_windows_by_brute_force():
  data = split(dict(answers='Bonn'), dict(answers='Mainz', context='Mainz'), seq_len=24)
  scores = np.random.default_rng(0).standard_normal((2, 260))  # Of a token's ends, by its id.
  places = np.random.default_rng(1).standard_normal((24, 2))

  def logits(rows):
    return scores[:, rows['tokens']].transpose(1, 2, 0) + places

  expected = []
  for example in data.examples:
    best = -np.inf, ''
    for window in data.windows(example):
      s = scores[:, window.tokens].T + places[: len(window.tokens)]
      inside = range(window.begin, window.begin + len(window.spans))
      for i, j in itertools.combinations_with_replacement(inside, 2):
        (a, _), (_, b) = window.spans[i - window.begin], window.spans[j - window.begin]
        best = max(best, (s[i, 0] + s[j, 1], example.texts[1][a:b].strip()))
    expected.append(best[1])
  for batch_size in (1, 4):
    assert spans.answers(logits, data, batch_size, lambda: False) == expected
  assert spans.answers(logits, data, 4, lambda: True) is None


def test_what_an_encoder_cannot_answer_is_refused():
  with pytest.raises(ValueError, match=r"the answer 'Rom' to 'Wo\?' is no part of its context"):
    split(dict(answers='Rom'))
  data = split(dict(answers='Bonn'))
  with pytest.raises(ValueError, match=r'give the model.s tokenizer\.json'):
    spans.Spanned(data.examples, tokenizer=data.tokenizer._replace(spans=None))


def test_a_head_for_spans_is_trained_and_measured(tmp_path):
  task = tasks.find('squad')
  fields = tasks.head_fields(task)
  assert fields == {'task': 'span', 'labels': 2}
  model = create('bert_tiny', vocab=260, hidden=16, intermediate=24, heads=2, layers=1, **fields)
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
  params = jax.tree.map(draw, model.abstract())
  data = split(dict(answers='Bonn'), dict(answers='Köln'), seq_len=32)
  total, count = jax.jit(model.loss)(params, data.eval_rows(0, 4, 0, 4))
  assert count == 2
  assert 0 < total / count < 10
  found = tasks.predict(model, params, task, data, 4)
  assert all(text in CONTEXT for text in found)
  assert set(tasks.measure(model, params, task, data, 4)) == {'token_f1', 'exact_match'}


def test_tokenizer_files_say_where_their_tokens_lie_in_the_text(tmp_path):
  """In the text as it was given, whatever is normalised; a blank may belong to the token after."""
  import tokenizers

  vocab = {'[UNK]': 0, '[SEP]': 1, 'zug': 2, 'koln': 3}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='[UNK]'))
  made.normalizer = tokenizers.normalizers.BertNormalizer()
  made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  made.add_special_tokens(['[SEP]'])
  made.save(str(tmp_path / 'words.json'))
  (tmp_path / 'bytes.json').write_text(train_bpe([CONTEXT] * 9, 290))
  for name in ('words', 'bytes'):
    opened = open_tokenizer(
      str(tmp_path / f'{name}.json'), None, vocab_size=300, cache_dir=tmp_path
    )
    found = opened.spans(CONTEXT)
    assert len(found) == len(opened.encode(CONTEXT))
    inside = [i for i, (a, b) in enumerate(found) if a < 20 and b > 16]
    assert CONTEXT[found[inside[0]][0] : found[inside[-1]][1]].strip() == 'Köln'
