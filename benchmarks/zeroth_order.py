"""What a zeroth-order step costs beside the two forward passes that it is made of.

Prints ratios of times: a whole step (passes on perturbed weights, then the update) of the 60M LLaMA
over two bare forward passes. Measured in turns in one process, as other work on the machine slows
both, on a CPU of its threads together; the smallest time of each counts. Aims: MeZO at most 1.25
with Gaussian noise and 1.08 with Rademacher, LOZO at most 1.05.

    python benchmarks/zeroth_order.py            # minutes on two cores

Dense noise is drawn three times a step, whatever the batch: the ratio falls as the batch grows.
LOZO joins the factors of its noise to a weight where the second product would cost a CPU two more
passes over the result (`memjax.weights.LowRank`).
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import memjax
from memjax.models import create
from memjax.steps import whole_tree, zeroth_order

STEPS = {
  'mezo gaussian': lambda: memjax.mezo(1e-6, form='weights'),
  'mezo rademacher': lambda: memjax.mezo(1e-6, form='weights', noise='rademacher'),
  'lozo rank 2': lambda: memjax.lozo(1e-6, form='weights'),
}

_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Measurements of each program; the least counts.')
_BATCH = flags.DEFINE_integer('batch', 16, 'Sequences of 256 tokens; 16 is what MeZO publishes.')


class _Step:
  """A compiled step that owns its donated state."""

  def __init__(self, model, transform, batch):
    init = lambda key: whole_tree.init_state(model.init, transform, key)
    self._state = jax.jit(init)(jax.random.key(0))
    step = zeroth_order.make_train_step(model.loss, transform)
    self._step, self._batch = jax.jit(step, donate_argnums=0), batch

  def __call__(self):
    self._state, metrics = self._step(self._state, self._batch)
    return metrics


def _seconds(run):
  clock = time.process_time if jax.default_backend() == 'cpu' else time.perf_counter
  start = clock()
  jax.block_until_ready(run())
  return clock() - start


def main(argv):
  del argv
  model = create('llama_60m')
  tokens = np.random.default_rng(0).integers(0, model.vocab, (_BATCH.value, 257))
  batch = {
    'tokens': jnp.asarray(tokens[:, :-1], jnp.int32),
    'targets': jnp.asarray(tokens[:, 1:], jnp.int32),
    'weights': jnp.ones((_BATCH.value, 256)),
  }
  params = jax.jit(model.init)(jax.random.key(0))
  forward = jax.jit(model.loss)

  def two_passes():
    jax.block_until_ready(forward(params, batch))
    return forward(params, batch)

  runs = [two_passes, *(_Step(model, make(), batch) for make in STEPS.values())]
  for run in runs:
    jax.block_until_ready(run())  # Compiles.
  times = [[_seconds(run) for run in runs] for _ in range(_ROUNDS.value)]
  base, *steps = (min(column) for column in zip(*times))
  print(f'two forward passes, {_BATCH.value} x 256 tokens: {base:.2f} s')
  for name, seconds in zip(STEPS, steps):
    print(f'{name}: {seconds / base:.3f}')


if __name__ == '__main__':
  app.run(main)
