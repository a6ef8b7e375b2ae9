"""The training order is a permutation per epoch and depends on nothing but its arguments."""

import subprocess
import sys

import numpy as np
import pytest

from memjax.data import Split
from memjax.data.order import shuffled


def epoch(number, size, seed):
  return [shuffled(p, size, seed) for p in range(number * size, (number + 1) * size)]


def counting_split(sequences, seq_len=3):
  """A split whose sequence `i` starts with token `i * seq_len`: rows name their sequence."""
  return Split(np.arange(sequences * seq_len + 1, dtype=np.uint16), seq_len, keep_partial=False)


@pytest.mark.parametrize('size', [1, 2, 7, 100, 1000])
def test_an_epoch_is_a_permutation(size):
  for number in range(3):
    assert sorted(epoch(number, size, seed=3)) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
  orders = [tuple(epoch(e, 100, seed)) for e in range(3) for seed in (0, 1, 2, 2**40, -1)]
  # Fifteen of 100! orders: grain alone would repeat some, because it adds the epoch to the seed.
  assert len(set(orders)) == len(orders)
  assert tuple(range(100)) not in orders


def test_order_looks_random():
  # Under a uniform permutation the mean of |i - order(i)| is n / 3, with a standard deviation of
  # about n / (4 sqrt(n)): that of one distance, 0.24 n, over sqrt(n) of them.
  distance = np.abs(np.array(epoch(0, 3000, seed=0)) - np.arange(3000)).mean()
  assert abs(distance - 1000) < 4 * 3000 / (4 * 3000**0.5)


def test_order_is_the_same_in_another_process():
  code = 'from memjax.data.order import shuffled; print([shuffled(p, 50, 9) for p in range(60)])'
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == str([shuffled(p, 50, 9) for p in range(60)])


def test_order_never_changes():
  # A golden value: if a new grain permutes differently, a resumed run would read other examples.
  assert epoch(0, 10, seed=0) + epoch(1, 10, seed=0)[:3] == [6, 2, 0, 3, 8, 4, 9, 7, 5, 1, 5, 9, 8]


def test_pieces_of_a_batch_make_the_whole_batch():
  split = counting_split(11)
  whole = split.rows(step=2, batch_size=8, start=0, stop=8, seed=5)
  for processes in (2, 4, 8):
    width = 8 // processes
    pieces = [split.rows(2, 8, p * width, (p + 1) * width, 5) for p in range(processes)]
    for name, array in whole.items():
      np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), array)


def test_batches_in_any_order_cover_epochs_and_cross_their_boundary():
  split = counting_split(11)
  # 11 steps of 4 rows are 4 epochs; all but one boundary falls inside a batch. Read them backwards.
  batches = {step: split.rows(step, 4, 0, 4, seed=7)['tokens'] for step in reversed(range(11))}
  seen = np.concatenate([batches[step][:, 0] // 3 for step in range(11)])
  for number in range(4):
    np.testing.assert_array_equal(seen[number * 11 : (number + 1) * 11], epoch(number, 11, 7))


def test_a_batch_may_be_larger_than_the_split():
  seen = counting_split(3).rows(0, 6, 0, 6, seed=0)['tokens'][:, 0] // 3
  assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]


@pytest.mark.parametrize(('step', 'start', 'stop'), [(-1, 0, 4), (0, -1, 4), (0, 3, 2), (0, 0, 5)])
def test_rows_outside_the_batch_are_refused(step, start, stop):
  with pytest.raises(ValueError, match=f'rows {start}:{stop} of batch {step} with batch_size=4'):
    counting_split(11).rows(step, 4, start, stop, seed=0)
