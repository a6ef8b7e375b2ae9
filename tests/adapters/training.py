"""Runs with adapters: resumed midway, layer by layer over a mesh, and in place."""

import jax
import numpy as np

from memjax import build, plan, sharding
from memjax import config as config_lib
from memjax.evaluate import place

STEPS = 5


def config(adapter, optimizer='vector_adam', learning_rate=0.05, **changes):
  """Of two layers, of which two matrices are adapted and little else is trained: that compiles
  sooner.
  """
  c = config_lib.default()
  c.model, c.steps, c.batch_size, c.seq_len = 'llama_tiny', 2 * STEPS, 8, 8
  sizes = dict(vocab=32, hidden=16, intermediate=32, heads=2, kv_heads=2, layers=2)
  c.model_args = dict(loss_chunk=64, **sizes)
  c.schedule.warmup_ratio = 0.0
  c.optimizer = config_lib.optimizer(optimizer, learning_rate=learning_rate)
  c.adapter = config_lib.adapter(**dict(targets='attn/o|mlp/up', rest='head') | adapter)
  c.update(changes)
  config_lib.validate(c)
  return c


def assert_trains_alike_everywhere(c, tolerance=2e-5):
  """Two updates, the state through the host, and three more are five at once, bit for bit; layer by
  layer over 2 x 2 x 2 devices they are the same but for the order of sums. State is donated.
  """
  parts = _parts(c, (1, 1, 1))
  step = parts.step.lower(parts.state, parts.batch).compile()
  plan.check_donated(step, parts.state)
  begun = jax.device_get(parts.init(build.root_key(c, 'params')))
  onto = lambda tree, shapes: jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), tree, shapes)
  whole, losses = run(c, parts, step, onto(begun, parts.state), range(STEPS))
  assert losses[-1] < losses[0] - 0.1
  half, first = run(c, parts, step, onto(begun, parts.state), range(2))
  resumed, second = run(c, parts, step, onto(jax.device_get(half), parts.state), range(2, STEPS))
  assert first + second == losses
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))

  c.step, c.remat = 'layerwise', 'full'
  parts = _parts(c, (2, 2, 2))
  step = parts.step.lower(parts.state, parts.batch).compile()
  plan.check_donated(step, parts.state)
  layered, others = run(c, parts, step, onto(begun, parts.state), range(STEPS))
  np.testing.assert_allclose(others, losses, rtol=tolerance)
  return jax.device_get(whole), jax.device_get(layered)


def run(c, parts, step, state, steps):
  """Returns the state after updates `steps`, and their losses."""
  losses = []
  for i in steps:
    tokens = np.random.default_rng(i).integers(0, 8, (c.batch_size, c.seq_len + 1), np.int32)
    rows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:]}
    rows['weights'] = np.ones((c.batch_size, c.seq_len), np.float32)
    read = lambda start, stop, rows=rows: {k: v[start:stop] for k, v in rows.items()}
    state, metrics = step(state, place(read, parts.batch))
    losses.append(float(metrics['train/loss']))
  return state, losses


def _parts(c, axes):
  mesh = sharding.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
  return build.build(c, mesh)
