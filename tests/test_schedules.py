"""Learning rates against the published table (warm-up 1,000 of 10,000 updates)."""

import pytest

from memjax import schedules

# Golden values of the official scheduler, in units of the peak.
COSINE = {0: 0, 1: 0.001, 500: 0.5, 1000: 1, 5500: 0.55, 9999: 0.10000003, 10_000: 0.1}


@pytest.mark.parametrize('count', COSINE)
def test_cosine_is_the_published_multiplier(count):
  schedule = schedules.cosine(1.0, steps=10_000, warmup_steps=1_000)
  assert float(schedule(count)) == pytest.approx(COSINE[count], abs=1e-7)  # f32 rounding of 1.


def test_peak_scales_the_whole_curve():
  one = schedules.cosine(1.0, steps=100, warmup_steps=10)
  other = schedules.cosine(0.02, steps=100, warmup_steps=10)
  assert float(other(57)) == pytest.approx(0.02 * float(one(57)), rel=1e-6)


def test_linear_ends_at_its_ratio_and_constant_stays():
  linear = schedules.linear(2.0, steps=110, warmup_steps=10, final_ratio=0.2)
  assert [float(linear(t)) for t in (10, 60, 110, 500)] == pytest.approx([2.0, 1.2, 0.4, 0.4])
  constant = schedules.constant(2.0, steps=110, warmup_steps=10)
  assert [float(constant(t)) for t in (5, 10, 110)] == pytest.approx([1.0, 2.0, 2.0])


def test_no_warm_up_starts_at_the_peak():
  assert float(schedules.cosine(1.0, steps=10, warmup_steps=0)(0)) == 1.0


@pytest.mark.parametrize('warmup_steps', [-1, 10, 11])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup_steps):
  with pytest.raises(ValueError, match=r'warmup_steps .* steps 10'):
    schedules.cosine(1.0, steps=10, warmup_steps=warmup_steps)
