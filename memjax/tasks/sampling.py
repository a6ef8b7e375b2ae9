"""Which examples of a file a published run saw: the protocols' draws, reproduced.

The draws are numpy's legacy generator's, as the published code makes them, so that the same seed
picks the same rows of the same file.
"""

from collections.abc import Sequence

import numpy as np

from memjax.tasks.task import Example

# Of MeZO's k-shot runs with RoBERTa (16 or 512 a class), which are LM-BFF's.
K_SHOT_SEEDS = (13, 21, 42, 87, 100)


def take(examples: Sequence[Example], count: int, seed: int, what: str) -> list[Example]:
  """Returns `count` examples in the order of a permutation; all, in file order, for 0.

  Raises:
    ValueError: when there are fewer.
  """
  if not count:
    return list(examples)
  _enough(len(examples), count, what)
  return [examples[i] for i in _permutation(len(examples), seed)[:count]]


def n_examples(
  examples: Sequence[Example], train: int, dev: int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
  """Draws a training and a development set from one file, as MeZO does for OPT.

  The published runs have 1,000 and 500 (CB and COPA: 100) with seed 0, and test on 1,000 of the
  validation split, drawn by `take` with the same seed.

  Args:
    examples: The training file.
    train: Training examples; 0 for all that are left.
    dev: Development examples, the last of the draw.
    seed: Of the draw.
  """
  if not train and not dev:
    return list(examples), []
  train = train or max(len(examples) - dev, 0)
  drawn = take(examples, train + dev, seed, f'{train} to train and {dev} to develop on')
  return drawn[:train], drawn[train:]


def k_shot(
  examples: Sequence[Example], shots: int, seed: int
) -> tuple[list[Example], list[Example]]:
  """Draws `shots` examples of each label to train on and as many to develop on, as LM-BFF does.

  After one shuffle of the file, the first `shots` of a label train and the next `shots` develop,
  label after label in the order in which the shuffle meets them. Numbers are two classes, parted
  at 2.5.

  Raises:
    ValueError: for a label with fewer than `2 * shots` examples.
  """
  groups = {}
  for i in _permutation(len(examples), seed):
    groups.setdefault(_group(examples[i].label), []).append(examples[i])
  for label, group in groups.items():
    _enough(
      len(group), 2 * shots, f'{shots} shots to train and as many to develop on, label {label}'
    )
  train = [e for group in groups.values() for e in group[:shots]]
  dev = [e for group in groups.values() for e in group[shots : 2 * shots]]
  return train, dev


def _group(label):
  return int(label >= 2.5) if isinstance(label, float) else label


def _permutation(size, seed):
  return np.random.RandomState(seed).permutation(size).tolist()


def _enough(available, wanted, what):
  if available < wanted:
    raise ValueError(f'{wanted} examples ({what}), but there are {available}')
