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


# Golden values of the official scheduler: 20,000 updates, 500 of warm-up, restarts every 5,000 with
# a warm-up of 100.
JAGGED = {0: 0, 250: 0.5, 500: 1, 4999: 0.88687791, 5000: 0, 5050: 0.4409894, 5099: 0.87315902}
JAGGED |= {5100: 0.88197881, 10_050: 0.28043684, 19_999: 0.10000001}
LATER = {3999: 0.886878, 4000: 0.88683, 4050: 0.884415, 5000: 0.8346, 8999: 0.568192, 9000: 0}
LATER |= {9050: 0.280437}  # 1,000 updates behind it, whose first restart does not warm up.


def jagged(**options):
  lengths = dict(steps=20_000, warmup_steps=500, restart_every=5_000, restart_warmup=100)
  return schedules.jagged(1.0, **lengths | options)


def test_restarts_are_the_published_multiplier():
  for count, value in JAGGED.items():
    assert float(jagged()(count)) == pytest.approx(value, abs=2e-6), count  # f32 sums of counts.
    assert float(jagged(official=True)(count)) == pytest.approx(value, abs=2e-6), count
  official, intended = jagged(adjust_step=1000, official=True), jagged(adjust_step=1000)
  for count, value in LATER.items():
    assert float(official(count)) == pytest.approx(value, abs=2e-6), count
    if not 4000 <= count < 4100:
      assert float(intended(count)) == pytest.approx(value, abs=2e-6), count
  assert float(intended(4000)) == 0
  assert float(intended(4050)) == pytest.approx(float(official(4100)) / 2, abs=2e-6)


def test_cycles_repeat_and_the_official_ones_hold_still_after_a_restart():
  lengths = dict(steps=300, warmup_steps=10, restart_every=100)
  cycles, official = (
    schedules.cycles(2.0, **lengths),
    schedules.cycles(2.0, **lengths, official=True),
  )
  one = schedules.cosine(2.0, steps=100, warmup_steps=10)
  for count in (0, 1, 5, 10, 55, 99):
    for start in (0, 100, 200):
      assert float(cycles(start + count)) == pytest.approx(float(one(count)), rel=1e-5)
  assert float(official(1)) == float(one(1))
  assert [float(official(t)) for t in (100, 101)] == pytest.approx([2e-7, 2e-7])
  assert float(official(102)) == pytest.approx(float(one(2)), rel=1e-5)


@pytest.mark.parametrize(
  ('options', 'says'),
  [
    (dict(restart_every=0), 'restart_every is 0'),
    (dict(adjust_step=4600), 'adjust_step 4600 and warmup_steps 500'),
    (dict(restart_warmup=5000), 'restart_warmup 5000'),
  ],
)
def test_restarts_that_contradict_each_other_are_refused(options, says):
  with pytest.raises(ValueError, match=says):
    jagged(**options)


@pytest.mark.parametrize('warmup_steps', [-1, 10, 11])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup_steps):
  with pytest.raises(ValueError, match=r'warmup_steps .* steps 10'):
    schedules.cosine(1.0, steps=10, warmup_steps=warmup_steps)
