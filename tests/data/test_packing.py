"""Sequences are cut with targets shifted by one; evaluation counts every token once."""

import numpy as np
import pytest

from memjax.data import Split

STREAM = np.array([9, 1, 2, 3, 9, 4, 5, 9, 6, 7, 8, 9], np.uint16)  # 11 tokens to predict; 9 ends.


def test_golden_sequences():
  split = Split(STREAM, seq_len=4, keep_partial=True)
  assert len(split) == 3
  assert split.num_tokens == 11
  batch = split.eval_rows(0, batch_size=3, start=0, stop=3)
  assert batch['tokens'].tolist() == [[9, 1, 2, 3], [9, 4, 5, 9], [6, 7, 8, 9]]
  assert batch['targets'].tolist() == [[1, 2, 3, 9], [4, 5, 9, 6], [7, 8, 9, 0]]
  assert batch['weights'].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
  assert {n: a.dtype.name for n, a in batch.items()} == {
    'tokens': 'int32',
    'targets': 'int32',
    'weights': 'float32',
  }


def test_training_drops_the_partial_sequence():
  split = Split(STREAM, seq_len=4, keep_partial=False)
  assert (len(split), split.num_tokens) == (2, 8)
  assert split.rows(0, 8, 0, 8, seed=0)['weights'].min() == 1


@pytest.mark.parametrize('seq_len', [1, 2, 3, 4, 5, 10, 11])
@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_evaluation_counts_every_token_once(seq_len, batch_size):
  split = Split(STREAM, seq_len, keep_partial=True)
  batches = [
    split.eval_rows(i, batch_size, 0, batch_size) for i in range(split.eval_batches(batch_size))
  ]
  assert {b['tokens'].shape for b in batches} == {(batch_size, seq_len)}
  counted = np.concatenate([b['targets'][b['weights'] == 1] for b in batches])
  np.testing.assert_array_equal(counted, STREAM[1:])  # In file order, with nothing left out.
  assert sum(b['weights'].sum() for b in batches) == split.num_tokens


def test_pieces_of_an_evaluation_batch_make_the_whole():
  split = Split(STREAM, 2, keep_partial=True)
  whole, pieces = split.eval_rows(1, 4, 0, 4), [split.eval_rows(1, 4, r, r + 1) for r in range(4)]
  for name, array in whole.items():
    np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), array)


def test_sequence_is_a_row_in_file_order():
  split = Split(STREAM, 4, keep_partial=True)
  for name, array in split.sequence(1).items():
    np.testing.assert_array_equal(array, split.eval_rows(0, 3, 1, 2)[name])
  with pytest.raises(IndexError, match='sequence 3 of a split with 3'):
    split.sequence(3)
  with pytest.raises(ValueError, match='evaluation batch 1 of 1'):
    split.eval_rows(1, 3, 0, 3)


def test_arrays_do_not_share_memory():
  batch = Split(STREAM, 4, keep_partial=True).sequence(0)
  batch['tokens'][:] = 0
  assert batch['targets'].tolist() == [[1, 2, 3, 9]]
  assert STREAM[1] == 1
