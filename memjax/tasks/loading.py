"""From the `task` fields of a config to splits of examples."""

import dataclasses
import functools
import hashlib
import pathlib

from ml_collections import ConfigDict

from memjax.data.sources import Source
from memjax.data.tokenizers import Frame, Tokenizer, open_tokenizer
from memjax.models.bert import Bert
from memjax.tasks import sampling
from memjax.tasks.options import Choosing
from memjax.tasks.prompts import Prompter
from memjax.tasks.rows import read
from memjax.tasks.spans import Spanned
from memjax.tasks.splits import Examples, Framed, Optioned, Prompted
from memjax.tasks.tables import find
from memjax.tasks.task import Example, Task


@dataclasses.dataclass(frozen=True, eq=False)
class TaskData:
  """Splits of a task to train, to develop and to test on, where a `memjax.data.Dataset` has text.

  Attributes:
    task: The task.
    train: Examples to train on.
    validation: Examples that choose among checkpoints: the development set.
    test: Examples that a result is reported on; those of `validation` where there are no others.
    tokenizer: What encodes them.
    source: Where the training examples came from.
    missing: Always empty; a task has no second choice.
  """

  task: Task
  train: Examples
  validation: Examples
  test: Examples
  tokenizer: Tokenizer
  source: str
  missing: tuple[str, ...] = ()

  def counts(self) -> tuple[int, int, str]:
    """Returns how much there is to train and to validate on, and of what."""
    return len(self.train), len(self.validation), 'examples'

  @property
  def fingerprint(self) -> str:
    """Of the training examples, their labels, and the tokenizer."""
    digest = hashlib.sha256(self.tokenizer.identity.encode())
    for example in self.train.examples:
      digest.update(f'{example.prompt} {example.options} {example.label}'.encode())
    return digest.hexdigest()[:16]


def load(
  fields: ConfigDict, model, tokenizer: str, seq_len: int, *, vocab_size: int, cache_dir
) -> TaskData:
  """Reads a task as a config's `task` fields say.

  Args:
    fields: See `memjax.config.default`.
    model: Says whether examples are prompts (decoders) or framed texts (encoders).
    tokenizer: See `memjax.data.load`; 'bpe' is trained on the training examples.
    seq_len: Tokens a row.
    vocab_size: Rows of the model's embedding.
    cache_dir: Directory for trained tokenizers.

  Raises:
    ValueError: for an unknown task, fields that contradict it, files without sound rows, or a task
      that the model cannot do, naming the field or the file and line.
  """
  task = resolve(fields)
  check_model(task, model, seq_len)
  drawn = Draw(task, fields)
  opened = _tokenizer(tokenizer, drawn, vocab_size, cache_dir)
  sources = tuple(sorted({e.source for e in drawn.pool if e.source}))
  make = _maker(drawn, model, opened, seq_len, sources)
  splits = (make(examples) for examples in (drawn.train, drawn.dev, drawn.test))
  return TaskData(task, *splits, opened, drawn.files[0])


def load_test(
  fields: ConfigDict, model, tokenizer: str, seq_len: int, *, vocab_size: int, cache_dir
) -> TaskData:
  """Reads what a model is measured on, as `load` does, and the training file only where a part of
  it is tested on, is shown in prompts, or trains the tokenizer; `train` and `validation` are empty.
  """
  task = resolve(fields)
  check_model(task, model, seq_len)
  drawn = Draw(task, fields)
  opened = _tokenizer(tokenizer, drawn, vocab_size, cache_dir)
  make = _maker(drawn, model, opened, seq_len)
  return TaskData(task, make([]), make([]), make(drawn.test), opened, drawn.files[0])


def resolve(fields: ConfigDict) -> Task:
  """Returns the task that a config names, with what the config changes of it."""
  changes = {k: fields[k] for k in ('template', 'answer', 'label') if fields[k]}
  changes |= {k: tuple(fields[k]) for k in ('words', 'metrics', 'texts') if fields[k]}
  changes |= {'new_tokens': fields.new_tokens} if fields.new_tokens else {}
  if not fields.name.startswith('jsonl:'):
    return dataclasses.replace(find(fields.name), **changes)
  if not fields.template:
    raise ValueError(
      f'config.task.name is {fields.name!r}, whose prompt nobody knows: set config.task.template, '
      "as in '{question}\\nAnswer:', and config.task.words or config.task.answer"
    )
  kind = 'classification' if fields.words else 'generation'
  metrics = ('accuracy',) if fields.words else ('exact_match', 'token_f1')
  label = 'label' if fields.words else 'answer'
  return Task(**{'name': fields.name, 'kind': kind, 'metrics': metrics, 'label': label, **changes})


def files(task: Task, fields: ConfigDict) -> tuple[str, str]:
  """Returns where the training and the test split are: named files, or the prepared dataset."""
  own = fields.name.removeprefix('jsonl:') if fields.name.startswith('jsonl:') else ''
  prepared = f'tfds:{task.tfds}' if task.tfds else ''
  train = fields.train or own or prepared
  # Files come together: a prepared dataset does not stand in for the half that was not named.
  test = fields.test or (prepared if not fields.train and not own else '')
  return train, test


class Draw:
  """Examples of a task by the protocols of `memjax.tasks.sampling`: `shots` a label, or `examples`
  and `dev_examples` of the training file, or all of it.

  A file is read when it is first asked for: who only tests needs no rows to train on.
  """

  def __init__(self, task: Task, fields: ConfigDict):
    self.task, self.fields, self.files = task, fields, files(task, fields)

  @functools.cached_property
  def pool(self) -> list[Example]:
    """All of the training file."""
    if not self.files[0]:
      raise ValueError(
        f'task {self.task.name!r} is not in TensorFlow Datasets; name its files as '
        'config.task.train and config.task.test'
      )
    return read(self.task, self.files[0], self.task.splits[0])

  @functools.cached_property
  def _parts(self):
    """What trains and what develops of the training file."""
    f = self.fields
    if f.shots:
      return sampling.k_shot(self.pool, f.shots, f.seed)
    return sampling.n_examples(self.pool, f.examples, f.dev_examples, f.seed)

  @property
  def train(self) -> list[Example]:
    """Examples to train on."""
    return self._parts[0]

  @functools.cached_property
  def dev(self) -> list[Example]:
    """Examples that choose among checkpoints; without any of their own, those of the test."""
    return self._own_dev or self.test

  @functools.cached_property
  def _own_dev(self):
    named = self.fields.dev
    return read(self.task, named, self.task.splits[1]) if named else self._parts[1]

  @functools.cached_property
  def test(self) -> list[Example]:
    """Examples to test on; without a file of their own, those that develop."""
    file = self.files[1]
    found = read(self.task, file, self.task.splits[1]) if file else self._own_dev
    if not found:
      raise ValueError(
        f'task {self.task.name!r} has nothing to measure on: name config.task.test or '
        'config.task.dev, or part the training file with config.task.dev_examples'
      )
    return sampling.take(found, self.fields.test_examples, self.fields.seed)


def check_model(task: Task, model, seq_len: int) -> None:
  """Raises a `ValueError` if a model cannot do a task."""
  if not is_encoder(model):
    if task.kind == 'generation' and task.new_tokens >= seq_len:
      raise ValueError(
        f'config.seq_len is {seq_len}, but an answer of task {task.name!r} may take '
        f'{task.new_tokens} tokens besides its prompt; raise it, or lower config.task.new_tokens'
      )
    return
  if task.kind not in ('classification', 'regression') and not task.spans:
    raise ValueError(
      f'task {task.name!r} asks for {task.kind}, which {type(model).__name__} has no head for; '
      'choose a decoder'
    )
  wanted = head_fields(task)
  for name, value in wanted.items():
    if getattr(model, name) != value:
      raise ValueError(
        f'task {task.name!r} needs {name}={value!r}, but the model has {getattr(model, name)!r}; '
        f'set config.model_args.{name}'
      )


def head_fields(task: Task) -> dict:
  """Returns the fields of an encoder that has the head of a task."""
  return {'task': 'span' if task.spans else task.kind, 'labels': task.labels}


def choosing(task: Task, model) -> Choosing:
  """Returns a decoder that is trained to choose among the words of a task."""
  if task.kind != 'classification':
    raise ValueError(
      f"config.task.loss='options' needs the same options in every row, and task {task.name!r} is "
      f"a {task.kind}; set config.task.loss='tokens'"
    )
  return Choosing(model, len(task.words), task.lengths)


def is_encoder(model) -> bool:
  """Whether a model reads whole texts and has a head for tasks."""
  return isinstance(model, Bert)


def _maker(drawn, model, tokenizer, seq_len, sources=()):
  """Returns the function from examples to a split."""
  task, fields = drawn.task, drawn.fields
  if task.spans and is_encoder(model):
    return lambda examples: Spanned(examples, sources, tokenizer, seq_len)
  if is_encoder(model):
    return lambda examples: Framed(examples, sources, tokenizer, seq_len, task.kind == 'regression')
  shown = ()
  if fields.demonstrations:
    shown = sampling.take(drawn.pool, fields.demonstrations, fields.seed)
  prompter = Prompter(task, tokenizer, seq_len + 1, tuple(shown))
  split = Optioned if fields.loss == 'options' else Prompted
  return lambda examples: split(examples, sources, prompter, seq_len)


def _tokenizer(name, drawn, vocab_size, cache_dir):
  """Opens a tokenizer; one that is trained reads the training examples."""
  train = drawn.train if name == 'bpe' else ()
  who = f'task {drawn.task.name}'
  texts = Source(who, lambda: map(_text, train), f'{who} {_identity(train)}')
  cache_dir = pathlib.Path(cache_dir).expanduser()
  opened = open_tokenizer(name, texts, vocab_size=vocab_size, cache_dir=cache_dir)
  return _begin(opened, drawn.fields.prefix)


def _begin(tokenizer: Tokenizer, prefix: str) -> Tokenizer:
  """Changes the tokens before every text, if the config says so."""
  if prefix == 'auto':
    return tokenizer
  if prefix == 'none':
    return tokenizer._replace(frame=Frame())
  if not prefix.isdigit() or int(prefix) >= tokenizer.vocab_size:
    raise ValueError(
      f"config.task.prefix is {prefix!r}; it is 'auto', 'none', or the id of a token below "
      f'{tokenizer.vocab_size}'
    )
  return tokenizer._replace(frame=tokenizer.frame._replace(first=(int(prefix),)))


def _text(example):
  return example.prompt + (example.options[example.right[0]] if example.options else '')


def _identity(examples):
  digest = hashlib.sha256()
  for example in examples:
    digest.update(_text(example).encode() + b'\0')
  return digest.hexdigest()
