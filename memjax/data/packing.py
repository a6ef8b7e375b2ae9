"""Sequences cut from one stream of tokens.

Shapes in this file: `T` is `seq_len`, `B` the rows asked for, `N` the tokens that can be predicted.
A stream holds `N + 1` tokens: an end-of-document token, then each document with one after it.
"""

import dataclasses

import numpy as np

from memjax.data import order


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """One side of the train/validation split, as sequences of tokens and of the tokens after them.

  Sequence `i` reads `stream[i * T : i * T + T + 1]`, so neighbours share one token, and every token
  after the first is a target once. Nothing but the rows asked for is read into memory.

  A batch is a dict of numpy arrays: 'tokens' i32[B, T], 'targets' i32[B, T], and 'weights'
  f32[B, T], which are 0 where there is nothing to predict.

  Attributes:
    stream: uint16[N + 1] or uint32[N + 1], usually memory-mapped.
    seq_len: `T`.
    keep_partial: Whether tokens after the last whole sequence make one more, padded with weight 0.
  """

  stream: np.ndarray
  seq_len: int
  keep_partial: bool

  def __len__(self):
    """Number of sequences."""
    whole, rest = divmod(len(self.stream) - 1, self.seq_len)
    return whole + (self.keep_partial and rest > 0)

  @property
  def num_tokens(self):
    """Number of targets with weight 1, over one pass."""
    return min(len(self) * self.seq_len, len(self.stream) - 1)

  def sequence(self, index):
    """Returns sequence `index` in file order as a batch of one row."""
    if not 0 <= index < len(self):
      raise IndexError(f'sequence {index} of a split with {len(self)}; count from 0')
    return self._gather([index])

  def rows(self, step, batch_size, start, stop, seed):
    """Returns rows `start:stop` of the global training batch of `step`.

    A pure function of its arguments: processes that ask for adjacent rows hold the same global
    batch however many they are, and a resumed run needs no iterator state. Every epoch is a new
    permutation; a batch may cross into the next one.

    Args:
      step: Updates finished before this batch, from 0.
      batch_size: Sequences in the global batch.
      start: First row wanted.
      stop: Row after the last one wanted, at most `batch_size`.
      seed: Seed of the order.
    """
    check_rows(step, batch_size, start, stop)
    positions = range(step * batch_size + start, step * batch_size + stop)
    return self._gather([order.shuffled(p, len(self), seed) for p in positions])

  def eval_batches(self, batch_size):
    """Number of batches that cover the split once; the last may be padded."""
    return -(-len(self) // batch_size)

  def eval_rows(self, index, batch_size, start, stop):
    """Returns rows `start:stop` of evaluation batch `index`, in file order.

    Rows past the end have weight 0, so that all batches have one shape and every token counts
    exactly once.
    """
    check_rows(index, batch_size, start, stop)
    if index >= self.eval_batches(batch_size):
      raise ValueError(f'evaluation batch {index} of {self.eval_batches(batch_size)}; count from 0')
    first = index * batch_size
    return self._gather([i if i < len(self) else None for i in range(first + start, first + stop)])

  def _gather(self, indices):
    """Reads one row an index; `None` gives a row of weight 0."""
    window = np.zeros((len(indices), self.seq_len + 1), np.int32)
    weights = np.zeros((len(indices), self.seq_len), np.float32)
    for row, index in enumerate(indices):
      if index is None:
        continue
      piece = self.stream[index * self.seq_len : (index + 1) * self.seq_len + 1]
      window[row, : len(piece)] = piece
      weights[row, : len(piece) - 1] = 1
    # Copies, because a caller that writes into 'tokens' must not change 'targets'.
    return {'tokens': window[:, :-1].copy(), 'targets': window[:, 1:].copy(), 'weights': weights}


def check_rows(step, batch_size, start, stop):
  if step < 0 or not 0 <= start <= stop <= batch_size:
    raise ValueError(
      f'rows {start}:{stop} of batch {step} with batch_size={batch_size}; '
      'need step >= 0 and 0 <= start <= stop <= batch_size'
    )
