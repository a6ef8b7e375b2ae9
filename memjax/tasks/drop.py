"""DROP's own scores: answers are bags of spans, and numbers must be right.

References:
  Dua et al., `DROP <https://arxiv.org/abs/1903.00161>`_, 2019, section 5
"""

import re
import string
from collections.abc import Sequence

import numpy as np

Answer = str | Sequence[str]  # One span, or the spans of an answer that has several.


def score(prediction: Answer, references: Sequence[Answer]) -> dict[str, float]:
  """Returns `exact_match` and `f1` against the best of several accepted answers.

  Spans are lower-cased; hyphens part words; articles and punctuation go, and numbers are compared
  as numbers. Spans of the two sides are paired one to one so that their F1s add up to most; a pair
  whose reference holds numbers, none of them in the prediction, has F1 0; unpaired spans count 0.

  >>> score('4.0 yards', ['4 yards'])
  {'exact_match': 1.0, 'f1': 1.0}
  >>> score('Smith', [['Smith', 'Jones']])
  {'exact_match': 0.0, 'f1': 0.5}
  """
  references = [references] if isinstance(references, str) else references
  scores = [(_exact(prediction, answer), _f1(prediction, answer)) for answer in references]
  exact, f1 = max(scores)
  return {'exact_match': float(exact), 'f1': float(f1)}


def _exact(prediction, answer):
  spans, wanted = _spans(prediction), _spans(answer)
  return len(spans) == len(wanted) and set(spans) == set(wanted)


def _f1(prediction, answer):
  bags, wanted = ([set(s.split()) for s in _spans(x)] for x in (prediction, answer))
  pairs = np.array([[_overlap(bag, other) for bag in bags] for other in wanted])
  # Two decimals, as the official program rounds each example.
  return round(_assign(pairs) / max(len(bags), len(wanted)), 2)


def _overlap(bag, wanted):
  numbers = {w for w in wanted if _is_number(w)}
  if numbers and not numbers & bag:
    return 0.0
  if not bag or not wanted:
    return float(bag == wanted)
  return 2 * len(bag & wanted) / (len(bag) + len(wanted))


def _assign(pairs):
  from scipy.optimize import linear_sum_assignment

  rows, columns = linear_sum_assignment(pairs, maximize=True)
  return pairs[rows, columns].sum()


def _spans(answer):
  return [_normal(span) for span in ([answer] if isinstance(answer, str) else answer)]


def _normal(span):
  words = (_word(word) for word in re.split(' |-', span.lower()))
  return ' '.join(word for word in words if word)


def _word(word):
  if not _is_number(word):
    word = ''.join(c for c in word if c not in string.punctuation)
  word = str(float(word)) if _is_number(word) else word
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', word).split())


def _is_number(word):
  try:
    float(word)
  except ValueError:
    return False
  return True
