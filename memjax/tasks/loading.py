"""From the `task` fields of a config to splits of examples."""

import dataclasses
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
  pool, train, dev, test = draw(task, fields)
  identity = f'task {task.name} {_identity(train)}'
  texts = Source(f'task {task.name}', lambda: map(_text, train), identity)
  opened = open_tokenizer(
    tokenizer, texts, vocab_size=vocab_size, cache_dir=pathlib.Path(cache_dir).expanduser()
  )
  opened = _begin(opened, fields.prefix)
  make = _maker(task, fields, model, opened, seq_len, pool)
  train_file, _ = files(task, fields)
  return TaskData(task, make(train), make(dev), make(test), opened, train_file)


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
  if not train:
    raise ValueError(
      f'task {task.name!r} is not in TensorFlow Datasets; name its files as config.task.train and '
      'config.task.test'
    )
  return train, test


def draw(task: Task, fields: ConfigDict) -> tuple[list[Example], ...]:
  """Returns the training file, and the training, development and test examples drawn.

  The protocols are those of `memjax.tasks.sampling`: `shots` a label, or `examples` and
  `dev_examples` of the training file, or all of it. Without a development set, the test set is it.
  """
  train_file, test_file = files(task, fields)
  pool = read(task, train_file, task.splits[0])
  if fields.shots:
    train, dev = sampling.k_shot(pool, fields.shots, fields.seed)
  else:
    train, dev = sampling.n_examples(pool, fields.examples, fields.dev_examples, fields.seed)
  dev = read(task, fields.dev, task.splits[1]) if fields.dev else dev
  if not test_file and not dev:
    raise ValueError(
      f'task {task.name!r} has nothing to measure on: name config.task.test or config.task.dev, or '
      'part the training file with config.task.dev_examples'
    )
  test = read(task, test_file, task.splits[1]) if test_file else dev
  test = sampling.take(test, fields.test_examples, fields.seed)
  return pool, train, dev or test, test


def check_model(task: Task, model, seq_len: int) -> None:
  """Raises a `ValueError` if a model cannot do a task."""
  if not is_encoder(model):
    if task.kind == 'generation' and task.new_tokens >= seq_len:
      raise ValueError(
        f'config.seq_len is {seq_len}, but an answer of task {task.name!r} may take '
        f'{task.new_tokens} tokens besides its prompt; raise it, or lower config.task.new_tokens'
      )
    return
  if task.kind not in ('classification', 'regression'):
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
  return {'task': task.kind, 'labels': task.labels}


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


def _maker(task, fields, model, tokenizer, seq_len, pool):
  """Returns the function from examples to a split."""
  sources = tuple(sorted({e.source for e in pool if e.source}))
  if is_encoder(model):
    return lambda examples: Framed(examples, sources, tokenizer, seq_len, task.kind == 'regression')
  shown = ()
  if fields.demonstrations:
    shown = sampling.take(pool, fields.demonstrations, fields.seed)
  prompter = Prompter(task, tokenizer, seq_len + 1, tuple(shown))
  split = Optioned if fields.loss == 'options' else Prompted
  return lambda examples: split(examples, sources, prompter, seq_len)


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
