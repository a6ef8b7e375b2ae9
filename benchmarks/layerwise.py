"""What a layer-by-layer step costs in time beside the ordinary one.

Prints the ratio of their times, with the same optimizer and both rematerialising every block in
full, measured in turns in one process, as other work on the machine slows both, on a CPU of its
threads together; the smallest time of each counts. Aim: at most 1.10.

    python benchmarks/layerwise.py            # minutes on two cores
    python benchmarks/layerwise.py --optimizer=galore --batch=8
"""

import time

import jax
import numpy as np
from absl import app, flags

from memjax import build, config, sharding
from memjax.evaluate import place

_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Measurements of each step; the least counts.')
_MODEL = flags.DEFINE_string('model', 'llama_quickstart', 'A name in memjax.models.PRESETS.')
_OPTIMIZER = flags.DEFINE_string('optimizer', 'adamw', 'A name in memjax.optimizers.OPTIMIZERS.')
_BATCH = flags.DEFINE_integer('batch', 8, 'Sequences a step.')
_LENGTH = flags.DEFINE_integer('length', 128, 'Tokens a sequence.')


def _step(kind):
  """Returns a function that makes one step and waits for it; the state advances."""
  c = config.default()
  c.model, c.step, c.remat = _MODEL.value, kind, 'full'
  c.batch_size, c.seq_len = _BATCH.value, _LENGTH.value
  c.optimizer = config.optimizer(_OPTIMIZER.value, learning_rate=1e-3)
  parts = build.build(c, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
  state = parts.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(
    0, parts.model.vocab, (c.batch_size, c.seq_len + 1), dtype=np.int32
  )
  weights = np.ones((c.batch_size, c.seq_len), np.float32)
  whole = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': weights}
  batch = place(lambda start, stop: {k: v[start:stop] for k, v in whole.items()}, parts.batch)

  def run():
    nonlocal state
    state, metrics = parts.step(state, batch)
    jax.block_until_ready((state, metrics))

  return run


def _seconds(run):
  clock = time.process_time if jax.default_backend() == 'cpu' else time.perf_counter
  start = clock()
  run()
  return clock() - start


def main(_):
  runs = [_step(kind) for kind in ('whole_tree', 'layerwise')]
  for run in runs:
    run()
    run()  # The first update may refresh every basis.
  times = [[_seconds(run) for run in runs] for _ in range(_ROUNDS.value)]
  ordinary, layered = (min(column) for column in zip(*times))
  print(
    f'{_OPTIMIZER.value}: layer by layer {layered:.4f} s, ordinary {ordinary:.4f} s, '
    f'ratio {layered / ordinary:.3f}'
  )


if __name__ == '__main__':
  app.run(main)
