"""From an example to tokens: prompts with options for decoders, framed texts for encoders.

Shapes in this file: a decoder's row has `T + 1` tokens at most, of which `T` are read and `T`
predicted; an encoder's has `T`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memjax.data.tokenizers import Tokenizer
from memjax.tasks.task import Example, Task

BETWEEN = '\n\n'  # What parts demonstrations from each other and from the question.


class Row(NamedTuple):
  """Tokens of a prompt and one of its options."""

  tokens: list[int]
  option: int  # How many of the last tokens are the option.


@dataclasses.dataclass(frozen=True)
class Prompter:
  """Encodes examples of one task for a decoder.

  Attributes:
    task: The task.
    tokenizer: Its `frame` says which tokens begin every text.
    length: Most tokens of a row, prompt and option. A longer one loses the front of its prompt, the
      tokens that begin it apart, as MeZO's do: demonstrations matter least, the question most. A
      generated answer that would take more than half the row loses its end.
    demonstrations: Examples shown with their answers before every prompt.
  """

  task: Task
  tokenizer: Tokenizer
  length: int
  demonstrations: Sequence[Example] = ()

  def row(self, example: Example, option: int) -> Row:
    """Returns the prompt followed by one of the example's options.

    Raises:
      ValueError: for an option that adds no token to its prompt, or none that fits.
    """
    prompt = example.prompt.strip(' ')
    spoken = (example.prompt + example.options[option]).strip(' ')
    encode = self.tokenizer.encode
    # By the difference of lengths: a word may change the tokens at the end of its prompt.
    count = len(encode(spoken)) - len(encode(prompt))
    tokens = encode(self._shown(spoken))
    if self.ends:
      tokens, count = [*tokens, self.tokenizer.eos_id], count + 1
    if self.task.kind == 'generation':
      tokens, count = self._shorten(tokens, count)
    if not 0 < count < self.length:
      raise ValueError(
        f'task {self.task.name!r}: option {example.options[option]!r} is {count} tokens after its '
        f'prompt, of {self.length} that a row has; raise config.seq_len, or change the words'
      )
    return Row(self._cut(tokens, self.length), count)

  def prompt(self, example: Example, room: int) -> list[int]:
    """Returns the prompt alone, which leaves `room` tokens for an answer."""
    tokens = self.tokenizer.encode(self._shown(example.prompt.strip(' ')))
    return self._cut(tokens, max(self.length - room, 1))

  @property
  def ends(self) -> bool:
    """Whether an answer ends with the end of the document."""
    return self.task.kind == 'generation' and not self.task.stop

  def _shown(self, text):
    shown = [(e.prompt + e.options[e.right[0]]).strip() for e in self.demonstrations]
    return BETWEEN.join([*shown, text]).lstrip()

  def _shorten(self, tokens, count):
    """Cuts the end of an answer that is too long beside its prompt, of which half a row is left."""
    before = len(self.tokenizer.frame.first) + len(tokens) - count
    kept = min(count, max(self.length - before, self.length // 2))
    return tokens[: len(tokens) - count + kept], kept

  def _cut(self, tokens, length):
    first = list(self.tokenizer.frame.first)
    room = max(length - len(first), 1)
    return first + tokens[-room:]


def pad(rows: Sequence[Row | None], length: int, fill: int = 0) -> dict[str, np.ndarray]:
  """Returns a decoder's batch: `tokens` and `targets` i32[B, T], `weights` f32[B, T].

  Weights are 1 where a token of the option is predicted. Padding is on the right, where causal
  attention keeps it out of sight of every token, so that no mask is needed.

  Args:
    rows: Rows of at most `length + 1` tokens; None for a row of weight 0.
    length: `T`.
    fill: Token of the padding.
  """
  window = np.full((len(rows), length + 1), fill, np.int32)
  weights = np.zeros((len(rows), length), np.float32)
  for i, row in enumerate(rows):
    if row is not None:
      end = len(row.tokens)
      window[i, :end] = row.tokens
      weights[i, end - 1 - row.option : end - 1] = 1
  return {'tokens': window[:, :-1].copy(), 'targets': window[:, 1:].copy(), 'weights': weights}


def framed(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> tuple[list[int], list[int]]:
  """Returns an encoder's tokens of one or two texts, and which text each belongs to (0 or 1).

  Where they are too long, tokens are taken from the end of the longer text, one by one, until both
  fit. More than two texts are joined: all but the last are one.
  """
  frame = tokenizer.frame
  if len(texts) == 1:
    kept = tokenizer.encode(texts[0])[: max(length - len(frame.first) - len(frame.last), 0)]
    tokens = [*frame.first, *kept, *frame.last]
    return tokens, [0] * len(tokens)
  a, b = tokenizer.encode(' '.join(texts[:-1])), tokenizer.encode(texts[-1])
  a, b = _fit(a, b, length - len(frame.first) - len(frame.between) - len(frame.last))
  front = [*frame.first, *a, *frame.between]
  return [*front, *b, *frame.last], [0] * len(front) + [1] * (len(b) + len(frame.last))


def _fit(a, b, room):
  """Shortens the longer of two until both have room, as 'longest first' does."""
  over = max(len(a) + len(b) - max(room, 0), 0)
  level = max(abs(len(a) - len(b)), 0)
  alone = min(over, level)  # What the longer loses before they are equally long.
  rest = over - alone
  lose_a = alone * (len(a) > len(b)) + rest // 2
  lose_b = over - lose_a
  return a[: max(len(a) - lose_a, 0)], b[: max(len(b) - lose_b, 0)]
