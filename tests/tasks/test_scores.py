"""Scores against values worked out by hand and against other programs' formulas."""

import numpy as np
import pytest

from memjax.tasks import drop, metrics
from memjax.tasks.metrics import METRICS


def test_classes_by_hand():
  # Of label 1: 2 hits, 1 false alarm, 2 misses; of the others, counted the same way.
  predictions = [1, 1, 1, 0, 0, 2]
  references = [1, 1, 0, 1, 1, 2]
  assert metrics.accuracy(predictions, references) == pytest.approx(3 / 6)
  assert metrics.f1(predictions, references) == pytest.approx(2 * 2 / (3 + 4))
  assert metrics.macro_f1(predictions, references) == pytest.approx((4 / 7 + 0 + 1) / 3)


def test_matthews_of_two_labels_is_the_formula_of_four_counts():
  rng = np.random.default_rng(0)
  references = rng.integers(0, 2, 200)
  predictions = np.where(rng.random(200) < 0.7, references, 1 - references)
  tp, tn, fp, fn = (
    float(np.sum((predictions == p) & (references == r)))
    for p, r in ((1, 1), (0, 0), (1, 0), (0, 1))
  )
  expected = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  assert metrics.matthews(predictions, references) == pytest.approx(expected, abs=1e-12)
  assert 0.2 < expected < 0.6


def test_matthews_of_three_labels():
  # scikit-learn 1.5: matthews_corrcoef([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]).
  # By hand: c = 4, s = 6, t = (2, 2, 2), p = (2, 3, 1): (24 - 12) / sqrt((36 - 14) (36 - 12)).
  got = metrics.matthews([0, 1, 1, 1, 2, 0], [0, 0, 1, 1, 2, 2])
  assert got == pytest.approx(12 / np.sqrt(22 * 24))
  assert metrics.matthews([1, 1, 1], [0, 1, 0]) == 0.0


def test_correlations_equal_scipys():
  stats = pytest.importorskip('scipy.stats')
  rng = np.random.default_rng(0)
  x = rng.integers(0, 6, 50).astype(float)  # Many ties.
  y = x + rng.standard_normal(50)
  assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
  assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
  assert metrics.pearson([1.0, 1.0], [0.0, 1.0]) == 0.0


def test_texts_as_squad_measures_them():
  predictions = ['The Norman  conquest!', 'in the 10th century', 'nobody']
  references = [['norman conquest'], ['10th and 11th centuries', '10th century'], ['Rollo']]
  assert metrics.exact_match(predictions, references) == pytest.approx(1 / 3)
  # 'in 10th century' shares two words of three with two of two.
  assert metrics.token_f1(predictions, references) == pytest.approx((1 + 2 * 2 / 5 + 0) / 3)
  # Words are counted as often as they occur on both sides.
  assert metrics.token_f1(['no no no'], [['no no yes']]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
  ('prediction', 'references', 'exact', 'f1'),
  [
    ('three yards', ['three-yard'], 0, 0.5),  # Hyphens part words; articles go.
    ('The 3.0', ['3'], 1, 1),
    ('4 yards', ['3 yards'], 0, 0),  # A wrong number shares nothing.
    ('yards', ['3 yards'], 0, 0),
    ('in 1912', ['1912'], 0, 0.67),
    (['Jones', 'Smith'], [['Smith', 'Jones']], 1, 1),  # In any order.
    ('Smith', [['Smith', 'Jones'], 'Smith'], 1, 1),  # The best of the accepted answers.
    (['A Smith', 'Jones'], ['Smith'], 0, 0.5),
  ],
)
def test_drop_by_hand(prediction, references, exact, f1):
  assert drop.score(prediction, references) == {'exact_match': exact, 'f1': f1}


def test_several_right_options():
  assert metrics.accuracy([0, 2, 1], [(0, 1), (0, 1), (1,)]) == pytest.approx(2 / 3)


@pytest.mark.parametrize('name', METRICS)
def test_what_cannot_be_compared_is_refused(name):
  with pytest.raises(ValueError, match='1 predictions for 2'):
    METRICS[name]([1], [1, 2])
  with pytest.raises(ValueError, match='empty'):
    METRICS[name]([], [])
