"""The published draws: the same rows of the same file from the same seed."""

import numpy as np
import pytest

from memjax import tasks
from memjax.tasks import sampling


def examples(count, labels=2):
  task = tasks.find('sst5')
  rows = ({'sentence': str(i), 'label': i % labels} for i in range(count))
  return [tasks.example(task, row, '') for row in rows]


def numbers(found):
  return [int(e.texts[0]) for e in found]


def test_n_examples_are_the_permutation_of_the_global_seed():
  np.random.seed(0)  # What the published code does.
  order = np.random.permutation(40).tolist()
  train, dev = sampling.n_examples(examples(40), 10, 5, seed=0)
  assert numbers(train) == order[:10]
  assert numbers(dev) == order[10:15]
  assert numbers(sampling.take(examples(40), 7, 0)) == order[:7]
  # The first draws of numpy's legacy generator, which no version of it may change.
  assert np.random.RandomState(0).permutation(8).tolist() == [6, 2, 1, 7, 3, 0, 5, 4]


def test_without_a_number_all_that_is_left_trains():
  train, dev = sampling.n_examples(examples(10), 0, 4)
  assert (len(train), len(dev)) == (6, 4)
  assert sorted(numbers(train + dev)) == list(range(10))
  train, dev = sampling.n_examples(examples(4), 0, 0)
  assert (numbers(train), dev) == ([0, 1, 2, 3], [])


@pytest.mark.parametrize('seed', sampling.K_SHOT_SEEDS)
def test_k_shot_is_a_shuffle_then_the_first_of_each_label(seed):
  lines = list(range(30))
  np.random.seed(seed)
  np.random.shuffle(lines)
  groups = {}
  for line in lines:
    groups.setdefault(line % 3, []).append(line)
  train, dev = sampling.k_shot(examples(30, labels=3), 4, seed)
  assert numbers(train) == [i for g in groups.values() for i in g[:4]]
  assert numbers(dev) == [i for g in groups.values() for i in g[4:8]]
  assert [sum(e.label == c for e in train) for c in range(3)] == [4, 4, 4]


def test_of_a_small_file_the_last_develop_and_the_rest_trains():
  order = np.random.RandomState(0).permutation(12).tolist()
  train, dev = sampling.n_examples(examples(12), 10, 5)
  assert (numbers(train), numbers(dev)) == (order[:7], order[7:])
  train, dev = sampling.k_shot(examples(5), 2, 13)  # Three of label 0, two of label 1.
  assert sorted(e.label for e in train) == [0, 0, 1, 1]
  assert [e.label for e in dev] == [0]


def test_a_draw_that_leaves_nothing_is_refused():
  with pytest.raises(ValueError, match='12 examples to develop on leave none of 12'):
    sampling.n_examples(examples(12), 10, 12)
  with pytest.raises(ValueError, match=r'5 shots.*no label has more than 5'):
    sampling.k_shot(examples(10), 5, 13)
