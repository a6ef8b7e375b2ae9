"""Whole runs of configs that take values in place of gradients, in this process."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest

import memjax
from memjax import config as config_lib
from memjax import metrics
from memjax.train import SKIPS, check_finite, train
from tests import launch

CONFIGS = (
  'lozo_llama7b',
  'mezo_llama7b',
  'mezo_opt13b',
  'zo2_opt13b',
  'zo2_opt66b',
  'zo2_opt175b',
)


def smoke(name, **changes):
  c = config_lib.load(str(launch.ROOT / f'configs/{name}.py:smoke'))
  c.steps, c.eval_every, c.sample.tokens = 2, 0, 0
  c.update(changes)
  return c


def run(c, directory):
  return train(c, directory, devices=jax.devices()[:1])


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_a_smoke_config_trains(name, tmp_path):
  assert run(smoke(name), tmp_path)['step'] == 2
  losses = list(launch.losses(tmp_path).values())
  assert np.isfinite(losses).all()
  assert len(set(losses)) == 2


@pytest.mark.slow
def test_a_streamed_run_stopped_before_an_update_is_applied_goes_on_with_the_same_bits(
  tmp_path, monkeypatch
):
  """It flushes to evaluate after step 2, to save after 3, and where it is stopped."""
  c = smoke('zo2_opt13b', steps=4, eval_every=2, log_every=1)
  c.checkpoint.every, c.eval_tokens = 3, 64
  alone = run(c, tmp_path / 'alone')

  write = metrics.MetricsWriter.write

  def stop(writer, step, values):
    write(writer, step, values)
    if step == 1:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricsWriter, 'write', stop)
    stopped = run(c, tmp_path / 'stopped')
  assert stopped['step'] == 1
  assert not stopped['state']['opt'].due
  resumed = run(c, tmp_path / 'stopped')
  assert_same_bits(resumed['state'], alone['state'])
  assert launch.lines(tmp_path / 'stopped') == launch.lines(tmp_path / 'alone')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mezo_opt13b', 'zo2_opt13b'])
def test_a_config_and_a_log_are_the_run(name, tmp_path):
  """16 bits, rounded stochastically; without a checkpoint. By either step, whose logs are one."""
  c = smoke(name)
  c.optimizer.learning_rate = 1e-3
  assert (c.param_dtype, c.rounding, c.optimizer.log_steps) == ('bfloat16', 'stochastic', 4)
  params = run(c, tmp_path / 'run')['state']['params']
  shutil.copy(tmp_path / 'run/log.npz', tmp_path)
  replayed = lambda **options: memjax.replay_run(tmp_path, devices=jax.devices()[:1], **options)
  for step in ('zeroth_order', 'streamed'):
    c.step = step
    (tmp_path / 'config.json').write_text(c.to_json())
    again = replayed()
    assert_same_bits(again, params)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(again)}
    assert kinds == ({'device', 'pinned_host'} if step == 'streamed' else {'device'})
  begin = replayed(steps=0)
  changed = jax.tree.map(lambda x, y: bool((x != y).any()), *jax.device_get((begin, params)))
  assert any(jax.tree.leaves(changed))


def test_what_no_replay_can_begin_with_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'config.json does not exist; .*log_steps'):
    memjax.replay_run(tmp_path)


def test_a_run_goes_on_after_steps_that_were_skipped():
  """Until there are too many in a row, and not if nothing says that they were."""
  nan = float('nan')
  check_finite(5, {'train/loss': nan, 'zo/skipped_in_a_row': 1})
  for values in (
    {'train/loss': nan},
    {'train/loss': nan, 'zo/skipped_in_a_row': 0},
    {'train/loss': nan, 'zo/skipped_in_a_row': SKIPS},
  ):
    with pytest.raises(FloatingPointError, match='train/loss is nan after step 5'):
      check_finite(5, values)
