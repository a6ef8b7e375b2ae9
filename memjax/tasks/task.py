"""What a task is: how a row of a file becomes a prompt, its possible answers, and a score."""

import dataclasses
import string
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from memjax.naming import nearest
from memjax.tasks.metrics import METRICS

KINDS = ('classification', 'regression', 'choice', 'generation')


def as_it_is(row: dict) -> Iterable[dict]:
  return (row,)


@dataclasses.dataclass(frozen=True)
class Task:
  """A task as data. A decoder reads `template` and continues it; an encoder reads `texts`.

  Attributes:
    name: What it is called.
    kind: 'classification' (the same `words` for every row), 'regression' (a number in `label`),
      'choice' (a row brings its own `options` and `label`), or 'generation' (a row's `answers`).
    template: The prompt, with `{field}` where a row's field goes.
    words: For classification what follows the prompt, one a label; for regression the words of the
      numbers 0, 1, ..., of which a decoder predicts the mean.
    answer: For generation, what follows the prompt, with `{answer}`.
    texts: One or two fields that an encoder reads; for generation a question and the context that
      the answer is a span of, or none where it is not.
    label: Field of the label; for generation, of the answers.
    names: What files call the labels, in their order, where they do not number them.
    rename: Other names under which files have the fields: pairs of theirs and ours.
    columns: Names of the columns of a .tsv that comes without a line of them.
    prepare: Turns a row of a file into rows of the task, for nested files and for prompts that no
      template can say.
    metrics: Keys of `memjax.tasks.metrics.METRICS`; the first is what one selects by.
    tfds: Its name in TensorFlow Datasets; '' where it is not there.
    splits: Names of the splits to train and to test on there.
    stop: Text at which a generated answer ends; '' is the end of the document, which training
      then appends.
    new_tokens: Most tokens of a generated answer.
    lengths: Whether options are compared by their mean log-probability a token, or by the sum.
  """

  name: str
  kind: str
  template: str
  words: tuple[str, ...] = ()
  answer: str = ' {answer}'
  texts: tuple[str, ...] = ()
  label: str = 'label'
  names: tuple[str, ...] = ()
  rename: tuple[tuple[str, str], ...] = ()
  columns: tuple[str, ...] = ()
  prepare: Callable[[dict], Iterable[dict]] = as_it_is
  metrics: tuple[str, ...] = ('accuracy',)
  tfds: str = ''
  splits: tuple[str, str] = ('train', 'validation')
  stop: str = '\n'
  new_tokens: int = 50
  lengths: bool = True

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f'task {self.name!r}: kind {self.kind!r}; {nearest(self.kind, KINDS)}')
    if self.kind == 'classification' and len(self.words) < 2:
      raise ValueError(f'task {self.name!r} classifies, so it needs two words or more')
    for metric in self.metrics:
      if metric not in METRICS:
        raise ValueError(f'task {self.name!r}: no metric {metric!r}; {nearest(metric, METRICS)}')

  @property
  def spans(self) -> bool:
    """Whether an answer is a span of the second of the texts."""
    return self.kind == 'generation' and len(self.texts) == 2

  @property
  def labels(self) -> int:
    """Number of labels an encoder's head has: 1 for a number, 2 for a span's ends."""
    if self.kind == 'classification':
      return len(self.words)
    return 1 if self.kind == 'regression' else 2

  def fields(self) -> tuple[str, ...]:
    """Fields that the template reads."""
    parsed = string.Formatter().parse(self.template)
    return tuple(dict.fromkeys(name for _, name, _, _ in parsed if name))


class Example(NamedTuple):
  """One row of a task, ready for any model."""

  prompt: str
  options: tuple[str, ...]  # What may follow the prompt, its white space included.
  label: Any  # Index of the right option; a number; or for generation the tuple of answers.
  right: tuple[int, ...]  # Indices of all options that count as right.
  texts: tuple[str, ...]  # What an encoder reads.
  source: str  # Where instruction data came from; '' where rows do not say.
  names: tuple[str, ...] = ()  # What the options stand for, where they are also scored as texts.
  starts: tuple[int, ...] = ()  # Where answers begin in the context, where rows say so.
  group: str = ''  # What rows are scored together by, such as their question.


def example(task: Task, row: dict, where: str) -> Example:
  """Returns one row as an example.

  Args:
    task: The task.
    row: Fields by their names in `task`, after `prepare`.
    where: File and line, for messages.

  Raises:
    ValueError: for a missing field, a label that is none or is outside the range, or no options,
      naming the place and the field.
  """
  needed = (*task.fields(), *([task.label] if task.kind != 'choice' else ['options', task.label]))
  for field in needed:
    if row.get(field) is None:
      raise ValueError(
        f'{where}: no field {field!r}, which task {task.name!r} reads; it has {", ".join(row)}'
      )
  prompt = task.template.format(**{field: row[field] for field in task.fields()})
  texts = tuple(str(row[field]) for field in task.texts if field in row)
  rest = {'source': str(row.get('source', '')), 'group': str(row.get('group', ''))}
  if task.kind == 'generation':
    answers = _answers(task, row, where)
    spoken = answers[0] if isinstance(answers[0], str) else ', '.join(answers[0])
    options, starts = (task.answer.format(answer=spoken),), tuple(row.get('starts', ()))
    return Example(prompt, options, answers, (0,), texts, starts=starts, **rest)
  if task.kind == 'regression':
    value = _value_of(task, row[task.label], where)
    words = tuple(map(_spoken(task), task.words))
    return Example(prompt, words, value, (round(value),), texts, **rest)
  if task.kind == 'choice':
    options, names = tuple(row['options']), tuple(row.get('names', ()))
    right = tuple(label_of(task, i, where, len(options)) for i in _several(row[task.label]))
    return Example(prompt, options, right[0], right, texts, names=names, **rest)
  label = label_of(task, row[task.label], where, len(task.words))
  return Example(prompt, tuple(map(_spoken(task), task.words)), label, (label,), texts, **rest)


def label_of(task: Task, value: Any, where: str, count: int) -> int:
  """Returns the index of one of `count` labels, which files give as a number, a truth value or a
  name.
  """
  if isinstance(value, str) and value in task.names:
    return task.names.index(value)
  number = _number(value)
  if number is None or not number.is_integer():
    known = ', '.join(map(repr, task.names)) or f'0 to {count - 1}'
    raise ValueError(
      f'{where}: field {task.label!r} is {value!r}, but labels of {task.name!r} are {known}'
    )
  return int(_within(task, int(number), count - 1, where))


def _value_of(task, value, where):
  number = _number(value)
  if number is None:
    raise ValueError(f'{where}: field {task.label!r} is {value!r}, not a number')
  return _within(task, number, len(task.words) - 1, where)


def _within(task, label, last, where):
  if not 0 <= label <= last:
    raise ValueError(
      f'{where}: field {task.label!r} is {label}, outside the range of task {task.name!r}, whose '
      f'labels are 0 to {last}; a split without labels (-1) can be neither trained nor measured on'
    )
  return label


def _number(value):
  """Returns what a file gives as a number, or None."""
  try:
    return float(value)
  except (TypeError, ValueError, OverflowError):
    return None


def _answers(task, row, where):
  answers = row[task.label]
  answers = (answers,) if isinstance(answers, str) else tuple(answers)
  if not answers:
    raise ValueError(f'{where}: field {task.label!r} is empty; an example needs one answer')
  return answers


def _spoken(task):
  """Words follow a space, unless the prompt has ended its line."""
  return lambda word: word if task.template.endswith(('\n', ' ')) else ' ' + word


def _several(label):
  return tuple(label) if isinstance(label, (list, tuple)) else (label,)
