"""Which examples of a file a published run saw: the protocols' draws, reproduced.

The draws are numpy's legacy generator's, as the published code makes them, so that the same seed
picks the same rows of the same file.
"""

from collections.abc import Sequence

import numpy as np

from memjax.tasks.task import Example

# Of MeZO's k-shot runs with RoBERTa (16 or 512 a class), which are LM-BFF's.
K_SHOT_SEEDS = (13, 21, 42, 87, 100)


def take(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
  """Returns `count` examples in the order of a permutation, all of them if there are fewer; for 0
  all, in file order.
  """
  if not count:
    return list(examples)
  return [examples[i] for i in _permutation(len(examples), seed)[:count]]


def n_examples(
  examples: Sequence[Example], train: int, dev: int, seed: int = 0
) -> tuple[list[Example], list[Example]]:
  """Draws a training and a development set from one file, as MeZO does for OPT.

  The published runs have 1,000 and 500 (CB and COPA: 100) with seed 0, and test on 1,000 of the
  validation split, drawn by `take` with the same seed. Of a file with fewer examples, the last of
  the draw develop and what is left trains: 54 of WSC's 554.

  Args:
    examples: The training file.
    train: Training examples; 0 for all that are left.
    dev: Development examples, the last of the draw.
    seed: Of the draw.

  Raises:
    ValueError: when nothing is left to train on.
  """
  if not train and not dev:
    return list(examples), []
  drawn = take(examples, train + dev if train else len(examples), seed)
  if len(drawn) <= dev:
    raise ValueError(
      f'{dev} examples to develop on leave none of {len(drawn)} to train on; lower '
      'config.task.dev_examples'
    )
  return drawn[: len(drawn) - dev], drawn[len(drawn) - dev :]


def k_shot(
  examples: Sequence[Example], shots: int, seed: int
) -> tuple[list[Example], list[Example]]:
  """Draws `shots` examples of each label to train on and as many to develop on, as LM-BFF does.

  After one shuffle of the file, the first `shots` of a label train and the next `shots` develop,
  label after label in the order in which the shuffle meets them; a label that has fewer gives what
  it has. Numbers are two classes, parted at 2.5.

  Raises:
    ValueError: when no label has more than `shots` examples, so that none is left to develop on;
      for answers, which have no labels.
  """
  groups = {}
  for i in _permutation(len(examples), seed):
    groups.setdefault(_group(examples[i].label), []).append(examples[i])
  train = [e for group in groups.values() for e in group[:shots]]
  dev = [e for group in groups.values() for e in group[shots : 2 * shots]]
  if not dev:
    most = max(map(len, groups.values()))
    raise ValueError(
      f'{shots} shots of each label leave none to develop on: no label has more than {most} '
      'examples; lower config.task.shots'
    )
  return train, dev


def _group(label):
  if isinstance(label, tuple):
    raise ValueError('config.task.shots counts examples of a label, and answers have none')
  return int(label >= 2.5) if isinstance(label, float) else label


def _permutation(size, seed):
  return np.random.RandomState(seed).permutation(size).tolist()
