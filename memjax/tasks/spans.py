"""Answers that are spans of a text: what an encoder with a head for spans reads, and what it
answers.

Shapes in this file: `B` rows of `T` tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from memjax.data.tokenizers import Tokenizer
from memjax.tasks.splits import Examples
from memjax.tasks.task import Example

LONGEST = 30  # Tokens of an answer, as in BERT's code.


class Window(NamedTuple):
  """A question, and as much of its context as there is room for."""

  tokens: list[int]
  begin: int  # Place of the first token of the context.
  spans: list[tuple[int, int]]  # Of its tokens here: where their characters begin and end in it.


@dataclasses.dataclass(frozen=True, eq=False)
class Spanned(Examples):
  """For encoders with a head for spans: `tokens`, `attention_mask` and `token_types` i32[B, T], and
  `labels` i32[B, 2], the places of the answer's first and last token.

  A context that is too long is read in windows that overlap by half. The loss is of the window with
  the answer in its middle; all of them are asked for an answer.

  Attributes:
    tokenizer: Has `spans`.
    seq_len: `T`.

  Raises:
    ValueError: for an answer that is no part of its context, or a tokenizer that cannot say where
      its tokens lie.
  """

  tokenizer: Tokenizer = None
  seq_len: int = 0

  def __post_init__(self):
    if self.tokenizer.spans is None:
      raise ValueError(
        "an encoder's answers are spans of the text, and where tokens lie in it a SentencePiece "
        ".model does not say; give the model's tokenizer.json as config.data.tokenizer"
      )
    for example in self.examples:
      _characters(example)

  def windows(self, example: Example) -> list[Window]:
    """Returns the rows that together hold all of an example's context."""
    frame, (question, context) = self.tokenizer.frame, example.texts
    asked = self.tokenizer.encode(question)[: self.seq_len // 2]
    front = [*frame.first, *asked, *frame.between]
    tokens, spans = self.tokenizer.encode(context), self.tokenizer.spans(context)
    room = max(self.seq_len - len(front) - len(frame.last), 1)
    stride = max(room // 2, 1)
    count = 1 - (-max(len(tokens) - room, 0) // stride)
    parts = [slice(i * stride, i * stride + room) for i in range(count)]
    make = lambda part: Window([*front, *tokens[part], *frame.last], len(front), spans[part])
    return [make(part) for part in parts]

  def batch(self, examples):
    pairs = [_about_answer(self.windows(e), e) if e else (None, (0, 0)) for e in examples]
    rows = self.rows_of([window for window, _ in pairs])
    return rows | {
      'labels': np.array([places for _, places in pairs], np.int32),
      'weights': np.array([e is not None for e in examples], np.float32),
    }

  def rows_of(self, windows: Sequence[Window | None]) -> dict[str, np.ndarray]:
    """Returns windows as rows; None for a row that is not counted."""
    shape = (len(windows), self.seq_len)
    tokens, mask, types = (np.zeros(shape, np.int32) for _ in range(3))
    mask[:, 0] = 1  # A row without tokens would attend to nothing.
    for i, window in enumerate(windows):
      if window is not None:
        end = len(window.tokens)
        tokens[i, :end], mask[i, :end], types[i, window.begin : end] = window.tokens, 1, 1
    return {'tokens': tokens, 'attention_mask': mask, 'token_types': types}


def answers(
  logits: Callable[[dict[str, np.ndarray]], np.ndarray],
  split: Spanned,
  batch_size: int,
  stop: Callable[[], bool],
) -> list[str] | None:
  """Returns the likeliest span of every example's context; None when told to stop.

  Args:
    logits: From rows of a batch to `f32[B, T, 2]`, of the answer's first and last token.
    split: The examples.
    batch_size: Rows at a time.
    stop: Asked before every batch.
  """
  best = [(-np.inf, '')] * len(split)
  for pairs in _batched(split, batch_size):
    if stop():
      return None
    padded = [window for _, window in pairs] + [None] * (batch_size - len(pairs))
    for (i, window), scores in zip(pairs, logits(split.rows_of(padded))):
      best[i] = max(best[i], _likeliest(window, scores, split.examples[i].texts[1]))
  return [text for _, text in best]


def _batched(split, batch_size) -> Iterator[list[tuple[int, Window]]]:
  pairs = []
  for i, example in enumerate(split.examples):
    pairs += [(i, window) for window in split.windows(example)]
    while len(pairs) >= batch_size:
      yield pairs[:batch_size]
      pairs = pairs[batch_size:]
  if pairs:
    yield pairs


def _likeliest(window: Window, scores: np.ndarray, context: str) -> tuple[float, str]:
  """The best score of a span within a window's context, and its text."""
  places = slice(window.begin, window.begin + len(window.spans))
  first, last = scores[places, 0], scores[places, 1]
  if not len(first):
    return -np.inf, ''
  offsets = np.arange(len(first))[None, :] - np.arange(len(first))[:, None]
  total = np.where((offsets >= 0) & (offsets < LONGEST), first[:, None] + last[None, :], -np.inf)
  i, j = np.unravel_index(np.argmax(total), total.shape)
  return float(total[i, j]), context[window.spans[i][0] : window.spans[j][1]].strip()


def _about_answer(windows: list[Window], example: Example) -> tuple[Window, tuple[int, int]]:
  """The window with the answer in its middle, and the places of the answer's ends there."""
  start, end = _characters(example)

  def margin(window):
    return min(start - window.spans[0][0], window.spans[-1][1] - end) if window.spans else -np.inf

  window = max(windows, key=margin)
  inside = [i for i, (a, b) in enumerate(window.spans) if a < end and b > start] or [0]
  return window, (window.begin + inside[0], window.begin + inside[-1])


def _characters(example: Example) -> tuple[int, int]:
  """Where the first accepted answer begins and ends in the context."""
  answer, (question, context) = example.label[0], example.texts
  given = example.starts[0] if example.starts else -1
  start = given if given >= 0 and context.startswith(answer, given) else context.find(answer)
  if start < 0:
    raise ValueError(
      f'the answer {answer!r} to {question!r} is no part of its context, {context[:60]!r}..., and '
      'an encoder answers with a part; leave the row out, or choose a decoder'
    )
  return start, start + len(answer)
