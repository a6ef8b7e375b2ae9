"""From the rows of published files to the rows that prompts read.

Files come flat (a question a row, as `datasets` and TensorFlow Datasets give them) or nested (as
the benchmarks distribute them); each function here takes one row of either and yields flat ones. A
`ValueError` of theirs is a sentence about the row, whose place the caller knows.
"""

import types
from collections.abc import Callable, Iterator


def stripped(field: str) -> Callable[[dict], Iterator[dict]]:
  """Returns a function that strips white space around a field."""

  def strip(row):
    yield row | ({field: row[field].strip()} if isinstance(row.get(field), str) else {})

  return strip


def labelled(row: dict) -> Iterator[dict]:
  """Leaves out rows on which annotators did not agree, as the benchmark does."""
  if row.get('label') not in ('-', -1):
    yield row


# What the integers of these fields stand for: in exports of `datasets`, and in its first ones and
# TensorFlow Datasets. Under 'label' they are in the order of the task's words, as LM-BFF has them.
TREC_ORDERS = types.MappingProxyType(
  {
    'coarse_label': ('ABBR', 'ENTY', 'DESC', 'HUM', 'LOC', 'NUM'),
    'label-coarse': ('DESC', 'ENTY', 'ABBR', 'HUM', 'NUM', 'LOC'),
  }
)


def trec(row: dict) -> Iterator[dict]:
  """Names the coarse label, which files number in several orders."""
  for field, names in TREC_ORDERS.items():
    if field in row:
      value = str(row[field])
      known = value.isdigit() and int(value) < len(names)
      row = row | {'label': names[int(value)] if known else row[field]}
  yield row


def boolq(row: dict) -> Iterator[dict]:
  """Makes the question one: a capital first, a question mark last."""
  question = row.get('question')
  if not question:
    yield row
    return
  question = question if question.endswith('?') else question + '?'
  yield row | {'question': question[0].upper() + question[1:]}


def wsc(row: dict) -> Iterator[dict]:
  """Takes the two spans out of `target`, where they are nested; the pronoun is in lower case."""
  row = row | row.get('target', {})
  yield row | ({'pronoun': row['span2_text'].lower()} if 'span2_text' in row else {})


def multirc(row: dict) -> Iterator[dict]:
  """Yields a row for every answer to every question of a paragraph; a question is a group."""
  if not isinstance(row.get('passage'), dict):
    own = row.get('idx') if isinstance(row.get('idx'), dict) else row
    yield row | {'group': f'{own.get("paragraph")}\n{own.get("question")}'}
    return
  for question in row['passage']['questions']:
    for answer in question['answers']:
      flat = {
        'paragraph': row['passage']['text'],
        'question': question['question'],
        'answer': answer['text'],
        'label': answer.get('label'),
      }
      ids = {'paragraph': row.get('idx'), 'question': question.get('idx')}
      yield from multirc(flat | ({} if None in ids.values() else {'idx': ids}))


def copa(row: dict) -> Iterator[dict]:
  """Joins the premise, without its full stop, to the choices by 'so' or 'because'."""
  if not {'premise', 'question', 'choice1', 'choice2'} <= row.keys():
    yield row
    return
  premise = row['premise'].rstrip().removesuffix('.')
  # Datasets that number their words for it count 'cause' first.
  effect = row['question'] in ('effect', 1)
  options = tuple(' ' + _continued(row[choice]) for choice in ('choice1', 'choice2'))
  yield row | {'prompt': premise + (' so' if effect else ' because'), 'options': options}


def _continued(choice):
  first, space, rest = choice.partition(' ')
  return (first if first == 'I' else first.lower()) + space + rest


def record(row: dict) -> Iterator[dict]:
  """Puts every entity into the query; highlights become items of a list, the query the last."""
  if 'qas' in row:
    yield from _nested_record(row)
    return
  if not {'passage', 'query', 'entities', 'answers'} <= row.keys():
    yield row
    return
  entities, answers = tuple(dict.fromkeys(_listed(row['entities']))), _listed(row['answers'])
  if not entities:
    raise ValueError("field 'entities' is empty, so that there is nothing to choose from")
  options = tuple(' ' + row['query'].replace('@placeholder', entity) for entity in entities)
  right = tuple(i for i, entity in enumerate(entities) if entity in answers)
  if answers and not right:
    raise ValueError(f"none of field 'answers', {', '.join(answers)}, is among 'entities'")
  passage = row['passage'].replace('@highlight\n', '- ')
  yield row | {
    'passage': passage,
    'options': options,
    'names': entities,
    'label': right or (-1,),
  }


def _nested_record(row):
  text = row['passage']['text']
  entities = [text[e['start'] : e['end'] + 1] for e in row['passage']['entities']]
  for question in row['qas']:
    answers = [answer['text'] for answer in question.get('answers', ())]
    flat = {'query': question['query'], 'entities': entities, 'answers': answers}
    yield from record({'passage': text, **flat})


def squad(row: dict) -> Iterator[dict]:
  """Yields a row for every question of an article; a question that has none is answered so."""
  if 'paragraphs' in row:
    for paragraph in row['paragraphs']:
      for question in paragraph['qas']:
        shared = {'title': row['title'], 'context': paragraph['context']}
        yield from squad(shared | {k: question.get(k) for k in ('question', 'answers')})
    return
  answers, starts = row.get('answers'), []
  if isinstance(answers, dict):  # Columns, as `datasets` has it.
    answers, starts = answers['text'], answers.get('answer_start', [])
  question = row.get('question')
  if answers is not None and question is not None:
    nested = [a for a in answers if isinstance(a, dict)]
    texts = [a['text'] for a in nested] or _listed(answers) or ['no answer']
    starts = [a['answer_start'] for a in nested if 'answer_start' in a] or starts
    starts = [starts] if isinstance(starts, int) else starts
    row = row | {'answers': texts, 'starts': starts, 'question': question.strip()}
  yield row


def drop(row: dict) -> Iterator[dict]:
  """Yields a row for every question of a passage, with every accepted answer once.

  An answer is one span, or the tuple of its spans. `answers_spans`, the form in which accepted
  answers are already run together, gives each span as an answer.
  """
  if 'qa_pairs' in row:
    for pair in row['qa_pairs']:
      yield from drop({'passage': row['passage'], **pair})
    return
  if 'passage' in row:
    row = row | {'context': row['passage']}
  if 'answers_spans' in row:
    answers = _listed(row['answers_spans']['spans'])
  else:
    validated = row.get('validated_answers') or ()
    given = [a for a in (row.get('answer'), *validated) if a]
    answers = [_drop_answer(a) for a in given] or row.get('answers')
  if answers is not None:
    row = row | {'answers': list(dict.fromkeys(map(_frozen, _listed(answers))))}
  if isinstance(row.get('question'), str):
    row = row | {'question': row['question'].strip()}
  yield row


def _drop_answer(answer):
  if isinstance(answer, str):
    return answer
  if answer.get('number'):
    return str(answer['number'])
  if answer.get('spans'):
    spans = tuple(_listed(answer['spans']))
    return spans[0] if len(spans) == 1 else spans
  date = answer.get('date') or {}
  return ' '.join(str(date[part]) for part in ('day', 'month', 'year') if date.get(part))


def _listed(values):
  """A text on its own is the only one of its list, not a list of letters."""
  return [values] if isinstance(values, str) else list(values)


def _frozen(answer):
  return answer if isinstance(answer, str) else tuple(answer)
