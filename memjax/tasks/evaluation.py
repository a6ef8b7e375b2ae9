"""What a model answers, and how much of it is right.

Shapes in this file: batches of `B` rows of at most `T` tokens.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.models.decode import decode
from memjax.tasks import prompts, scoring, spans
from memjax.tasks.metrics import METRICS, OF_TEXTS
from memjax.tasks.spans import Spanned
from memjax.tasks.splits import Examples, Framed
from memjax.tasks.task import Example, Task


def measure(
  model: Any,
  params: Any,
  task: Task,
  split: Examples,
  batch_size: int,
  *,
  stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
  """Returns the scores of a model on a split: one for each of the task's metrics.

  A decoder chooses the likeliest option, continues the prompt greedily, or, where the answer is a
  number, gives the mean over its words; an encoder reads its head, and of a span gives the text.
  Rows are sharded as the model's activations are.

  Args:
    model: A decoder or an encoder.
    params: Its parameters, as its functions take them.
    task: The task.
    split: Its examples.
    batch_size: Rows at a time.
    stop: Asked before every batch; when it says yes, None is returned.
  """
  predictions = predict(model, params, task, split, batch_size, stop=stop)
  if predictions is None:
    return None
  return score(task, predictions, split.examples)


def score(task: Task, predictions: Sequence, examples: Sequence[Example]) -> dict[str, float]:
  """Returns the scores of what was answered to examples: one for each of the task's metrics."""
  return {name: _score(task, name, predictions, examples) for name in task.metrics}


def _score(task, name, predictions, examples):
  references = [_reference(task, example) for example in examples]
  if name == 'group_accuracy':
    references = [(e.group, label) for e, label in zip(examples, references)]
  if task.kind == 'choice' and name in OF_TEXTS:
    predictions = [e.names[i] for e, i in zip(examples, predictions)]
    references = [[e.names[i] for i in e.right] for e in examples]
  return METRICS[name](predictions, references)


def predict(
  model: Any,
  params: Any,
  task: Task,
  split: Examples,
  batch_size: int,
  *,
  stop: Callable[[], bool] = lambda: False,
) -> list | None:
  """Returns what a model answers to every example: a label, a number or a text."""
  if isinstance(split, Spanned):
    read = lambda rows: jax.device_get(_head_logits(model, params, rows))
    return spans.answers(read, split, batch_size, stop)
  if isinstance(split, Framed):
    return _read_heads(model, params, task, split, batch_size, stop)
  if task.kind == 'generation':
    return _generate(model, params, split, batch_size, stop)
  score = functools.partial(scoring.log_likelihood, model, params)
  scores = scoring.option_scores(score, split.prompter, split.examples, batch_size, stop=stop)
  if scores is None:
    return None
  if task.kind == 'regression':
    return [_expected(options) for options in scores]
  return [int(np.argmax(options)) for options in scores]


def _reference(task: Task, example: Example):
  if task.kind in ('generation', 'regression'):
    return example.label
  return example.right if len(example.right) > 1 else example.right[0]


def _expected(scores: np.ndarray) -> float:
  """The mean of 0, 1, ... under the probabilities of their words."""
  weights = np.exp(scores - scores.max())
  return float(weights @ np.arange(len(scores)) / weights.sum())


@functools.partial(jax.jit, static_argnames='model')
def _head_logits(model, params, batch):
  types = batch['token_types'] if model.types > 1 else None
  logits = model.logits(params, batch['tokens'], batch['attention_mask'], types)
  return scoring.everywhere(model, logits)


def _read_heads(model, params, task, split, batch_size, stop):
  found = []
  for index in range(split.eval_batches(batch_size)):
    if stop():
      return None
    rows = split.eval_rows(index, batch_size, 0, batch_size)
    batch = {k: rows[k] for k in ('tokens', 'attention_mask', 'token_types')}
    logits = jax.device_get(_head_logits(model, params, batch))
    found.extend(logits.tolist() if task.kind == 'regression' else logits.argmax(-1).tolist())
  return found[: len(split)]


def _generate(model, params, split, batch_size, stop):
  """Continues prompts of a like length together, greedily, up to the task's stop."""
  prompter = split.prompter
  room = prompter.task.new_tokens
  # A prompt and its answer are at most as long as a row of a training batch.
  most = prompter.length - 1 - room
  encoded = [prompter.prompt(example, room + 1) for example in split.examples]
  near = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
  texts = [''] * len(encoded)
  ends = stop_tokens(prompter)
  for start in range(0, len(near), batch_size):
    if stop():
      return None
    chosen = near[start : start + batch_size]
    tokens, mask = _left([encoded[i] for i in chosen], batch_size, most)
    key = jax.random.key(0)  # Of no effect on the likeliest tokens.
    added = decode(model, params, tokens, room, key, 0.0, attention_mask=mask, stop=ends)
    added = jax.device_get(jax.jit(functools.partial(scoring.everywhere, model))(added))
    for row, i in enumerate(chosen):
      texts[i] = answer_text(prompter, added[row].tolist(), ends)
  return texts


def stop_tokens(prompter: prompts.Prompter) -> np.ndarray:
  """Returns the tokens at which an answer ends, `i32[s]`: the last of its stop, and the end of the
  document.
  """
  last = prompter.tokenizer.encode(prompter.task.stop)[-1:] if prompter.task.stop else []
  return np.array([*last, prompter.tokenizer.eos_id], np.int32)


def answer_text(prompter: prompts.Prompter, tokens: Sequence[int], ends: np.ndarray) -> str:
  """Returns the text of an answer, up to where it ends."""
  end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
  text = prompter.tokenizer.decode(tokens[:end])
  stop = prompter.task.stop
  # A stop that is part of a longer token.
  return (text.partition(stop)[0] if stop else text).strip()


def _left(rows, batch_size, most):
  """Returns rows with their padding on the left; one more token is a row of it."""
  length = scoring.rounded(max(map(len, rows)), most)
  tokens = np.zeros((batch_size, length), np.int32)
  mask = np.zeros((batch_size, length), np.int32)
  mask[:, -1] = 1  # A row of padding alone has nothing to attend to.
  for place, row in enumerate(rows):
    tokens[place, length - len(row) :] = row
    mask[place, length - len(row) :] = 1
  return jnp.asarray(tokens), jnp.asarray(mask)
