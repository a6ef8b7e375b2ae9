"""Which tokens are the prompt's, which the option's, and what is lost when a row is too long."""

import numpy as np
import pytest
import words

from memjax import tasks
from memjax.tasks import prompts
from memjax.tasks.splits import Framed, Prompted

ROW = dict(sentence='a very fine film', label=1)


def prompter(row=ROW, name='sst2', length=32, first=(), **more):
  task = tasks.find(name)
  tokenizer = words.tokenizer(first)
  return prompts.Prompter(task, tokenizer, length, **more), tasks.example(task, row, 'row')


def test_the_option_is_what_it_adds_to_the_prompt():
  p, example = prompter(first=(60,))
  row = p.row(example, 1)
  assert p.tokenizer.decode(row.tokens) == 'a very fine film It was great'
  assert row.tokens[0] == 60
  # The word and its blank are one token; a blank left on the prompt would have made it two.
  assert row.option == 1
  assert p.tokenizer.decode(row.tokens[-1:]) == ' great'


def test_a_row_too_long_loses_the_front_of_its_prompt():
  p, example = prompter(length=4, first=(60,))
  row = p.row(example, 0)
  assert row.tokens[0] == 60
  assert p.tokenizer.decode(row.tokens) == ' It was terrible'
  assert (len(row.tokens), row.option) == (4, 1)
  with pytest.raises(ValueError, match=r"' terrible' is 1 tokens.*raise config\.seq_len"):
    prompter(length=1)[0].row(example, 0)


def test_demonstrations_come_first_with_their_answers():
  p, example = prompter()
  shown = [tasks.example(p.task, dict(sentence='bad', label=0), 'row')] * 2
  p, _ = prompter(demonstrations=shown)
  text = p.tokenizer.decode(p.row(example, 1).tokens)
  assert text == ('bad It was terrible\n\nbad It was terrible\n\na very fine film It was great')


def test_a_generated_answer_ends_as_the_task_says():
  row = dict(title='T', context='C', question='Q', answers=['six words'])
  p, example = prompter(row, 'squad')
  got = p.row(example, 0)
  assert p.tokenizer.decode(got.tokens[-got.option :]) == ' six words\n'
  p, example = prompter(dict(instruction='Add', output='It is six'), 'instruct', length=64)
  got = p.row(example, 0)
  assert got.tokens[-1] == words.END
  assert p.tokenizer.decode(got.tokens[-got.option :]) == 'It is six'


def test_a_long_answer_keeps_half_a_row_or_what_the_prompt_leaves():
  answer = ' '.join('abcdefghijklmnopqr')
  row = dict(title='T', context='C', question='Q', answers=[answer])
  p, example = prompter(row, 'squad')
  prompt = len(p.tokenizer.encode(example.prompt))
  for length, kept in ((prompt + 2, (prompt + 2) // 2), (2 * prompt + 4, prompt + 4)):
    got = prompts.Prompter(p.task, p.tokenizer, length).row(example, 0)
    assert (len(got.tokens), got.option) == (length, kept)
    said = p.tokenizer.decode(got.tokens[-kept:])
    assert f' {answer}\n'.startswith(said)
    read = p.tokenizer.decode(got.tokens[:-kept])
    assert example.prompt.endswith(read)


def test_a_batch_weighs_the_options_tokens_alone():
  p, example = prompter(dict(sentence='x', label=0))
  split = Prompted([example], prompter=p, seq_len=6)
  batch = split.eval_rows(0, 2, 0, 2)
  row = p.row(example, 0)
  assert batch['tokens'].tolist() == [[*row.tokens, 0, 0], [0] * 6]
  assert batch['targets'].tolist() == [[*row.tokens[1:], 0, 0, 0], [0] * 6]
  assert batch['weights'].tolist() == [[0, 0, 1, 0, 0, 0], [0] * 6]
  assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
    'tokens': ('int32', (2, 6)),
    'targets': ('int32', (2, 6)),
    'weights': ('float32', (2, 6)),
    'source': ('int32', (2,)),
  }


def test_the_order_is_a_function_of_seed_and_step():
  task = tasks.find('sst2')
  examples = [tasks.example(task, dict(sentence=f'w{i}', label=0), '') for i in range(10)]
  split = Prompted(examples, prompter=prompts.Prompter(task, words.tokenizer(), 16), seq_len=8)
  first = lambda step, seed, size=5: split.rows(step, size, 0, size, seed)['tokens'][:, 0].tolist()
  epoch = first(0, 0) + first(1, 0)
  assert len(set(epoch)) == 10
  assert first(0, 0, 10) == epoch  # Whatever the batch.
  assert first(2, 0) + first(3, 0) != epoch
  assert first(0, 1) != first(0, 0)
  halves = [split.rows(1, 4, i, i + 2, 0)['tokens'] for i in (0, 2)]
  np.testing.assert_array_equal(np.concatenate(halves), split.rows(1, 4, 0, 4, 0)['tokens'])


@pytest.mark.parametrize(
  ('length', 'kept'),
  [(9, 'a b c d|x y'), (8, 'a b c|x y'), (7, 'a b|x y'), (6, 'a b|x'), (5, 'a|x')],
)
def test_two_texts_are_shortened_from_the_longer(length, kept):
  tokenizer = words.tokenizer(first=(60,), between=(61,), last=(62,))
  ids, kinds = prompts.framed(tokenizer, ('a b c d', 'x y'), length)
  between = ids.index(61)
  assert (ids[0], ids[-1], len(ids)) == (60, 62, length)
  assert kinds == [0] * (between + 1) + [1] * (length - between - 1)
  text = tokenizer.decode(ids[:between]) + '|' + tokenizer.decode(ids[between:])
  assert text == kept


def test_an_encoders_batch():
  task = tasks.find('stsb')
  row = dict(sentence1='a b', sentence2='a', label=2.5)
  tokenizer = words.tokenizer(first=(60,), between=(61,), last=(62,))
  split = Framed([tasks.example(task, row, '')], tokenizer=tokenizer, seq_len=8, number=True)
  batch = split.eval_rows(0, 2, 0, 2)
  assert batch['tokens'][0].tolist() == [60, 1, 2, 61, 1, 62, 0, 0]
  assert batch['token_types'][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
  assert batch['attention_mask'][0].tolist() == [1] * 6 + [0] * 2
  assert batch['labels'].tolist() == [2.5, 0]
  assert batch['weights'].tolist() == [1, 0]
  assert batch['attention_mask'][1].any()  # Attends to something, counts for nothing.


def test_frames_of_tokenizer_files_are_found(tmp_path):
  import tokenizers

  from memjax.data.tokenizers import open_tokenizer

  vocab = {'[UNK]': 0, '[CLS]': 1, '[SEP]': 2, 'a': 3, 'b': 4}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='[UNK]'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(['[CLS]', '[SEP]'])
  frames = {
    '$A': ((), (), ()),
    '[CLS] $A [SEP]': ((1,), (2,), (2,)),
    '[CLS] $A [SEP] [SEP]': ((1,), (2, 2), (2,)),
  }
  for pair, frame in frames.items():
    if pair != '$A':
      made.post_processor = tokenizers.processors.TemplateProcessing(
        single='[CLS] $A [SEP]',
        pair=f'{pair} $B [SEP]',
        special_tokens=[('[CLS]', 1), ('[SEP]', 2)],
      )
    path = tmp_path / 'tokenizer.json'
    made.save(str(path))
    opened = open_tokenizer(str(path), None, vocab_size=8, cache_dir=tmp_path)
    assert opened.frame == frame
    ids, _ = prompts.framed(opened, ('a b', 'b'), 16)
    assert ids == made.encode('a b', 'b').ids
