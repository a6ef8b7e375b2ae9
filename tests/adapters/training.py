"""Runs with adapters: resumed midway, layer by layer over a mesh, and in place."""

import jax
import jax.numpy as jnp
import numpy as np

from memjax import build, plan, sharding, weights
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


def assert_resumes(c):
  """Two updates, the state through the host, and three more are five at once, bit for bit; all
  state is donated.
  """
  parts, step, begun = _compiled(c, (1, 1, 1))
  whole, losses = run(c, parts, step, _onto(begun, parts), range(STEPS))
  assert losses[-1] < losses[0] - 0.1
  half, first = run(c, parts, step, _onto(begun, parts), range(2))
  resumed, second = run(c, parts, step, _onto(jax.device_get(half), parts), range(2, STEPS))
  assert first + second == losses
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))
  return jax.device_get(whole)


def assert_same_layer_by_layer_over_a_mesh(c, tolerance=2e-5):
  """Layer by layer over 2 x 2 x 2 devices, losses are the same but for the order of sums."""
  parts, step, begun = _compiled(c, (1, 1, 1))
  whole, losses = run(c, parts, step, _onto(begun, parts), range(STEPS))
  c.step, c.remat = 'layerwise', 'full'
  parts, step, _ = _compiled(c, (2, 2, 2))
  layered, others = run(c, parts, step, _onto(begun, parts), range(STEPS))
  np.testing.assert_allclose(others, losses, rtol=tolerance)
  return jax.device_get(whole), jax.device_get(layered)


def assert_same_over_devices(restart, state):
  """A restart of `state['params']['w']`, of adapted `[L, m, n]`, m over two devices and n over
  four, against that on one; returns it.
  """
  mesh = jax.make_mesh((2, 4), ('m', 'n'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  params = sharding.weight_shardings(
    state['params'],
    {'w': jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'm', 'n'))},
  )
  trained, shardings = map(weights.trained, (state['params'], params))
  placed = {
    'step': whole,
    'params': params,
    'opt': sharding.state_shardings(state['opt'], trained, shardings),
  }
  state = state | {'step': jnp.int32(state['step'])}
  one = jax.jit(restart)(state)
  many = jax.jit(restart, out_shardings=placed)(jax.device_put(state, placed))
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6)
  jax.tree.map(near, many, one)
  return one


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


def _compiled(c, axes):
  mesh = sharding.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
  parts = build.build(c, mesh)
  step = parts.step.lower(parts.state, parts.batch).compile()
  plan.check_donated(step, parts.state)
  # Drawn on one device alone, which compiles sooner.
  begun = jax.device_get(parts.init(build.root_key(c, 'params'))) if mesh.size == 1 else None
  return parts, step, begun


def _onto(state, parts):
  return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, parts.state)
