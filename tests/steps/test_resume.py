"""A run that is killed and resumed layer by layer: four steps are two, a checkpoint, and two."""

import signal

import jax
import numpy as np
import pytest

from memjax import build, checkpoint, config, sharding
from memjax.evaluate import place
from tests import launch
from tests.steps.test_layerwise import tiny_config

SHORT = dict(rank=32, refresh_every=3)  # A refresh on each side of the checkpoint.
# Moments of 4096 numbers a layer, from where on they are quantised.
WIDE = dict(hidden=128, intermediate=256)
RUNS = {
  # Moments in 8 bits, bases in 4, weights in 8, and what is large in host memory.
  'q_galore': (dict(name='q_galore8bit', **SHORT), dict(weights='int8', offload_state=1.0)),
  'galore8bit': (
    dict(name='galore8bit', basis_bits=8, **SHORT),
    dict(offload_state=0.5, clip_norm=0.5, accumulate=2),
  ),
  'apollo_mini': (
    dict(name='apollo_mini8bit', refresh_every=3),
    dict(weights='int8', offload_state=1.0),
  ),
  'adalomo': (dict(name='adalomo'), dict(param_dtype='bfloat16', clip_norm=0.5, clip_by='layer')),
  'hift': (dict(name='adamw'), dict(step='hift', param_dtype='bfloat16')),
  'badam': (dict(name='adamw'), dict(step='badam', param_dtype='bfloat16', groups=dict(every=3))),
  'lisa': (dict(name='adamw8bit'), dict(step='lisa', groups=dict(every=3))),
}


def run(parts, state, steps):
  """Returns the state after updates `steps`, and their losses."""
  losses = []
  for i in steps:
    tokens = np.random.default_rng(i).integers(0, 64, (4, 17), np.int32)
    rows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones((4, 16), 'f')}
    read = lambda start, stop, rows=rows: {k: v[start:stop] for k, v in rows.items()}
    state, metrics = parts.step(state, place(read, parts.batch))
    losses.append(float(metrics['train/loss']))
  return state, losses


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_a_resumed_run_has_the_same_bits(name, tmp_path):
  optimizer, changes = RUNS[name]
  step = changes.get('step', 'layerwise')
  changes = changes | dict(step=step, batch_size=4, model_args=dict(WIDE))
  c = tiny_config(dict(learning_rate=0.01, **optimizer), **changes)
  config.validate(c)
  parts = build.build(c, sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2]))
  fresh = lambda: parts.init(build.root_key(c, 'params'))
  whole, losses = run(parts, fresh(), range(4))
  assert len(set(losses)) == 4
  half, first = run(parts, fresh(), range(2))
  with checkpoint.Checkpoints(tmp_path / 'saved', every=1) as checkpoints:
    checkpoints.maybe_save(half, 2, {}, force=True)
  del half
  with checkpoint.Checkpoints(tmp_path / 'saved', every=1) as checkpoints:
    restored = checkpoints.restore(parts.state)
  where = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  assert where(restored.state) == where(parts.state)
  resumed, second = run(parts, restored.state, range(2, 4))
  assert first + second == losses
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))


@pytest.mark.slow
def test_a_killed_process_resumes_with_the_same_bits(tmp_path):
  """Weights and moments in 8 bits, bases in 4, all state in host memory; killed by SIGKILL between
  checkpoints.
  """
  steps = 6
  flags = [f'--config.steps={steps}', '--config.checkpoint.every=2', '--config.checkpoint.keep=9']
  flags += ['--config.offload_state=1.0', '--config.optimizer.min_size=64']
  flags += ['--config.eval_every=0', '--config.sample.tokens=0']
  how = dict(config='configs/q_galore_llama7b.py:smoke', cache=tmp_path / 'cache')
  alone = launch.run(tmp_path / 'alone', *flags, **how)
  assert alone.returncode == 0, alone.stderr
  workdir = tmp_path / 'killed'
  killed = launch.run(
    workdir, *flags, moment='step=3', send=signal.SIGKILL, WAIT_FOR_CHECKPOINT='2', **how
  )
  assert killed.returncode == -signal.SIGKILL
  assert launch.checkpoints(workdir) == [2]
  resumed = launch.run(workdir, *flags, **how)
  assert resumed.returncode == 0, resumed.stderr
  assert 'Resuming after step 2' in resumed.stdout
  assert launch.lines(workdir) == launch.lines(tmp_path / 'alone')
  expected = launch.digests(tmp_path / 'alone', steps)
  assert {'uint8', 'int8'} <= {leaf['dtype'] for leaf in expected.values()}
  assert launch.digests(workdir, steps) == expected
