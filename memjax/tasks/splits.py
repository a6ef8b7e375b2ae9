"""Examples as batches: what `memjax.data.Split` is for text, for the examples of a task.

Shapes in this file: `B` rows of `T` tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from memjax.data import order
from memjax.data.packing import check_rows
from memjax.data.tokenizers import Tokenizer
from memjax.tasks import prompts
from memjax.tasks.options import OPTION_TOKENS
from memjax.tasks.task import Example


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """One split of a task; `rows` and `eval_rows` are those of `memjax.data.Split`.

  A row is encoded when it is asked for, so nothing is read, held or encoded twice over processes.

  Attributes:
    examples: In file order, or in that of the draw.
    sources: Names of the sources of instruction data, in order; a row's `source` counts in it.
  """

  examples: Sequence[Example]
  sources: tuple[str, ...] = ()

  def __len__(self):
    return len(self.examples)

  def rows(self, step, batch_size, start, stop, seed):
    """Returns rows `start:stop` of the global training batch of `step`.

    A pure function of its arguments; every epoch is a new permutation.
    """
    check_rows(step, batch_size, start, stop)
    positions = range(step * batch_size + start, step * batch_size + stop)
    return self.batch([self.examples[order.shuffled(p, len(self), seed)] for p in positions])

  def eval_batches(self, batch_size):
    """Number of batches that cover the split once; the last may be padded."""
    return -(-len(self) // batch_size)

  def eval_rows(self, index, batch_size, start, stop):
    """Returns rows `start:stop` of evaluation batch `index`; those past the end have weight 0."""
    check_rows(index, batch_size, start, stop)
    first = index * batch_size
    wanted = range(first + start, first + stop)
    return self.batch([self.examples[i] if i < len(self) else None for i in wanted])

  def batch(self, examples: Sequence[Example | None]) -> dict[str, np.ndarray]:
    """Returns examples as a batch; None for a row of weight 0."""
    raise NotImplementedError

  def source_rows(self, examples: Sequence[Example | None]) -> np.ndarray:
    """Returns which source each example is from, `i32[B]`, 0 for none."""
    index = {name: i for i, name in enumerate(self.sources)}
    return np.array([index.get(e.source, 0) if e else 0 for e in examples], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompted(Examples):
  """For decoders: the prompt followed by the right option, which alone has weight.

  Batches are `tokens`, `targets` i32[B, T] and `weights` f32[B, T], as every training step takes
  them, so the loss is the cross-entropy of a token of an answer.
  """

  prompter: prompts.Prompter = None
  seq_len: int = 0

  def batch(self, examples):
    rows = [self.prompter.row(e, e.right[0]) if e else None for e in examples]
    return prompts.pad(rows, self.seq_len) | {'source': self.source_rows(examples)}


@dataclasses.dataclass(frozen=True, eq=False)
class Optioned(Prompted):
  """For decoders trained as classifiers: every option of every example.

  Batches are as `memjax.tasks.options.Choosing.batch_shapes` says.
  """

  def batch(self, examples):
    count = len(self.prompter.task.words)
    options = [[self.prompter.row(e, i) if e else None for i in range(count)] for e in examples]
    rows = prompts.pad([row for rows in options for row in rows], self.seq_len)
    longest = max((row.option for rows in options for row in rows if row), default=0)
    if longest > OPTION_TOKENS:
      raise ValueError(
        f'task {self.prompter.task.name!r} has an option of {longest} tokens, but the loss over '
        f"options reads {OPTION_TOKENS}; set config.task.loss='tokens'"
      )
    shaped = {k: v.reshape(len(examples), count, self.seq_len) for k, v in rows.items()}
    return {
      'tokens': shaped['tokens'],
      'targets': shaped['targets'],
      'places': shaped['weights'],
      'labels': np.array([e.right[0] if e else 0 for e in examples], np.int32),
      'weights': np.array([e is not None for e in examples], np.float32),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Framed(Examples):
  """For encoders: `tokens`, `attention_mask` and `token_types` i32[B, T], and `labels`.

  Labels are i32[B] for classes and f32[B] for numbers; `weights` f32[B] are 0 where a row pads the
  batch.
  """

  tokenizer: Tokenizer = None
  seq_len: int = 0
  number: bool = False  # Whether labels are numbers, not classes.

  def batch(self, examples):
    shape = (len(examples), self.seq_len)
    tokens, mask, types = (np.zeros(shape, np.int32) for _ in range(3))
    labels = np.zeros(len(examples), np.float32 if self.number else np.int32)
    weights = np.zeros(len(examples), np.float32)
    for i, example in enumerate(examples):
      # A row without tokens would attend to nothing.
      ids, kinds = prompts.framed(self.tokenizer, example.texts if example else ('',), self.seq_len)
      tokens[i, : len(ids)], types[i, : len(ids)], mask[i, : len(ids)] = ids, kinds, 1
      if example:
        labels[i], weights[i] = example.label, 1
    return {
      'tokens': tokens,
      'attention_mask': mask,
      'token_types': types,
      'labels': labels,
      'weights': weights,
    }
