"""Scores as the benchmarks define them, each a function of predictions and references.

Shapes in this file: `n` examples. Predictions of classes are `[n]` labels, and references `[n]`
labels or, where several are right, `n` tuples of them; predictions of text are `n` strings, and
references `n` sequences of accepted answers.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np


def accuracy(predictions: Sequence, references: Sequence) -> float:
  """Share of predictions that are right; of several right answers any will do.

  >>> accuracy([1, 0, 2], [1, 1, (2, 3)])
  0.6666666666666666
  """
  _check(predictions, references)
  right = [
    prediction in reference if isinstance(reference, (tuple, list)) else prediction == reference
    for prediction, reference in zip(predictions, references)
  ]
  return float(np.mean(right))


def group_accuracy(predictions: Sequence, references: Sequence[tuple]) -> float:
  """Share of groups of which every prediction is right, as MultiRC's exact match of questions.

  References are pairs of a group and a label.

  >>> group_accuracy([1, 0, 1], [('a', 1), ('a', 0), ('b', 0)])
  0.5
  """
  _check(predictions, references)
  right = {}
  for prediction, (group, label) in zip(predictions, references):
    right[group] = right.get(group, True) and prediction == label
  return float(np.mean(list(right.values())))


def f1(predictions: Sequence[int], references: Sequence[int]) -> float:
  """Harmonic mean of precision and recall of label 1; 0 where neither is defined.

  >>> f1([1, 1, 0, 1], [1, 0, 1, 1])
  0.6666666666666666
  """
  return _f1_of(1, *_labels(predictions, references))


def macro_f1(predictions: Sequence[int], references: Sequence[int]) -> float:
  """Mean of every label's F1, over the labels that occur on either side."""
  predictions, references = _labels(predictions, references)
  labels = np.union1d(predictions, references)
  return float(np.mean([_f1_of(label, predictions, references) for label in labels]))


def matthews(predictions: Sequence[int], references: Sequence[int]) -> float:
  """Matthews' correlation, of any number of labels; 0 where either side has one label only.

  References:
    Gorodkin, `Comparing two K-category assignments by a K-category correlation coefficient
    <https://doi.org/10.1016/j.compbiolchem.2004.09.006>`_, 2004
  """
  predictions, references = _labels(predictions, references)
  labels = np.union1d(predictions, references)
  p, r = (np.equal.outer(labels, x).astype(np.float64) for x in (predictions, references))
  covariance = lambda a, b: np.sum(a * b) * a.shape[1] - np.sum(a, axis=1) @ np.sum(b, axis=1)
  scale = np.sqrt(covariance(p, p) * covariance(r, r))
  return float(covariance(p, r) / scale) if scale else 0.0


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
  """Correlation of two series; 0 where either is constant."""
  _check(predictions, references)
  x, y = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
  x, y = x - x.mean(), y - y.mean()
  scale = np.sqrt((x @ x) * (y @ y))
  return float(x @ y / scale) if scale else 0.0


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
  """Correlation of ranks; equal values share the mean of theirs.

  >>> spearman([1.0, 2.0, 2.0, 9.0], [0.1, 0.2, 0.2, 0.3])
  1.0
  """
  return pearson(_ranks(predictions), _ranks(references))


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
  """Share of texts that equal an accepted answer, case, punctuation and articles apart.

  >>> exact_match(['The Eiffel tower.', 'Rome'], [['Eiffel Tower'], ['Paris', 'Lutetia']])
  0.5
  """
  equal = lambda text, answer: float(_normal(text) == _normal(answer))
  return _best(equal, predictions, references)


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
  """Mean F1 of the words shared with the best accepted answer, as SQuAD measures.

  An answer of no words, such as 'no answer' normalised away, is right only against another.

  References:
    Rajpurkar et al., `SQuAD <https://arxiv.org/abs/1606.05250>`_, 2016
  """
  overlap = lambda text, answer: _overlap(_normal(text).split(), _normal(answer).split())
  return _best(overlap, predictions, references)


def _f1_of(label, predictions, references):
  hits = np.sum((predictions == label) & (references == label))
  total = np.sum(predictions == label) + np.sum(references == label)
  return float(2 * hits / total) if total else 0.0


def _ranks(values):
  values = np.asarray(values, np.float64)
  _, group, count = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(count) - (count - 1) / 2)[group]


def _normal(text: str) -> str:
  text = ''.join(c for c in text.lower() if c not in string.punctuation)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def _overlap(a: list[str], b: list[str]) -> float:
  if not a or not b:
    return float(a == b)
  return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))


def _best(score, predictions, references):
  """Mean over examples of the best score that any accepted answer gives."""
  _check(predictions, references)
  one = lambda reference: [reference] if isinstance(reference, str) else reference
  said = lambda answer: answer if isinstance(answer, str) else ', '.join(answer)
  best = [
    max(score(text, said(answer)) for answer in one(reference))
    for text, reference in zip(predictions, references)
  ]
  return float(np.mean(best))


def _labels(predictions, references):
  _check(predictions, references)
  # Of several right labels, the one that was predicted counts as the reference.
  chosen = [
    (p if p in r else r[0]) if isinstance(r, (tuple, list)) else r
    for p, r in zip(predictions, references)
  ]
  return np.asarray(predictions), np.asarray(chosen)


def _check(predictions, references):
  if len(predictions) != len(references):
    raise ValueError(
      f'{len(predictions)} predictions for {len(references)} references; a score compares them '
      'one by one'
    )
  if not len(predictions):
    raise ValueError('no examples to score; the split is empty')


def _drop(name):
  def metric(predictions, references):
    from memjax.tasks import drop

    _check(predictions, references)
    scores = [drop.score(p, r)[name] for p, r in zip(predictions, references)]
    return float(np.mean(scores))

  metric.__doc__ = 'See `memjax.tasks.drop`.'
  return metric


METRICS = {
  'accuracy': accuracy,
  'group_accuracy': group_accuracy,
  'f1': f1,
  'macro_f1': macro_f1,
  'matthews': matthews,
  'pearson': pearson,
  'spearman': spearman,
  'exact_match': exact_match,
  'token_f1': token_f1,
  'drop_exact_match': _drop('exact_match'),
  'drop_f1': _drop('f1'),
}
# Those that compare texts; of chosen options, the texts that these stand for.
OF_TEXTS = ('exact_match', 'token_f1', 'drop_exact_match', 'drop_f1')
