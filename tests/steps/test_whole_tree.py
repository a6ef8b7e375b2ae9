"""The training step against plain optax, over micro-batches, and over meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import build, config, plan, sharding, transforms
from memjax.evaluate import place
from memjax.steps import whole_tree

MESHES = {'one': (1, 1, 1), 'data': (8, 1, 1), 'fsdp': (1, 8, 1), 'mixed': (2, 2, 2)}


def linear_loss(params, batch):
  """A token predicts its target by a line: small enough for closed forms."""
  error = batch['tokens'] * params['w'] - batch['targets']
  return jnp.sum(batch['weights'] * error**2), jnp.sum(batch['weights'])


def linear_batch(rows=8):
  rng = np.random.default_rng(0)
  weights = (rng.random((rows, 4)) < 0.6).astype(np.float32)
  weights[0] = 0  # A micro-batch with fewer tokens than the others.
  return {
    'tokens': rng.integers(0, 9, (rows, 4)),
    'targets': rng.integers(0, 9, (rows, 4)),
    'weights': weights,
  }


def linear_state(transform, dtype=jnp.float32):
  return whole_tree.init_state(
    lambda key: {'w': jnp.full((1, 1), 0.5, dtype)}, transform, jax.random.key(0)
  )


@pytest.mark.parametrize('accumulate', [1, 2, 8])
def test_a_step_is_the_gradient_of_the_mean_over_tokens(accumulate):
  batch, transform = linear_batch(), optax.sgd(0.01)
  step = jax.jit(whole_tree.make_train_step(linear_loss, transform, accumulate=accumulate))
  state, metrics = step(linear_state(transform), batch)
  x, y, w = (batch[k].astype(np.float64) for k in ('tokens', 'targets', 'weights'))
  gradient = np.sum(w * 2 * x * (0.5 * x - y)) / w.sum()  # Not the mean of per-batch means.
  np.testing.assert_allclose(state['params']['w'], 0.5 - 0.01 * gradient, rtol=1e-6)
  np.testing.assert_allclose(
    metrics['train/loss'], np.sum(w * (0.5 * x - y) ** 2) / w.sum(), rtol=1e-6
  )
  np.testing.assert_allclose(metrics['train/grad_norm'], abs(gradient), rtol=1e-6)
  assert int(state['step']) == 1


def test_clipping_bounds_the_update_and_reports_the_norm_before_it():
  batch, transform = linear_batch(), optax.sgd(1.0)
  step = jax.jit(whole_tree.make_train_step(linear_loss, transform, clip_norm=0.125))
  state, metrics = step(linear_state(transform), batch)
  np.testing.assert_allclose(abs(state['params']['w'] - 0.5), 0.125, rtol=1e-6)
  assert float(metrics['train/grad_norm']) > 1


def test_a_bfloat16_update_below_half_an_ulp_survives_on_average():
  """Rounded to nearest, 0.5 - 0.0005 is 0.5 for ever (an ulp below it is 0.002); stochastically the
  mean moves.
  """
  loss = lambda params, batch: (jnp.sum(params['w'].astype(jnp.float32)), jnp.float32(1))
  transform = optax.sgd(0.0005)
  batch = {'weights': jnp.ones((1, 1))}

  def moved(rounding_key):
    init = lambda key: {'w': jnp.full((4096,), 0.5, jnp.bfloat16)}
    state = whole_tree.init_state(init, transform, jax.random.key(0))
    step = jax.jit(whole_tree.make_train_step(loss, transform, rounding_key=rounding_key))
    for _ in range(4):
      state, _ = step(state, batch)
    return 0.5 - float(jnp.mean(state['params']['w'].astype(jnp.float32)))

  assert moved(None) == 0
  # Each element makes 4 draws of an ulp 2**-9 with probability near a quarter: 5 standard errors
  # are 1.3e-4.
  assert moved(jax.random.key(1)) == pytest.approx(4 * 0.0005, abs=1.3e-4)


def tiny_config(**optimizer):
  c = config.default()
  c.model, c.steps, c.batch_size, c.seq_len = 'llama_tiny', 20, 16, 16
  # kv_heads 4, so that `tensor` divides every kernel.
  c.model_args = dict(loss_chunk=64, kv_heads=4)
  c.schedule.warmup_ratio = 0.0
  c.optimizer = config.optimizer(**optimizer)
  return c


def run(c, axes, steps=20):
  """Returns the losses of a run on random tokens, and its last state."""
  mesh = sharding.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
  parts = build.build(c, mesh)
  state = parts.init(build.root_key(c, 'params'))
  losses = []
  for i in range(steps):
    rng = np.random.default_rng(i)
    tokens = rng.integers(0, 64, (c.batch_size, c.seq_len + 1))
    whole = {
      'tokens': tokens[:, :-1].astype(np.int32),
      'targets': tokens[:, 1:].astype(np.int32),
      'weights': np.ones((c.batch_size, c.seq_len), np.float32),
    }
    rows = lambda start, stop, whole=whole: {k: v[start:stop] for k, v in whole.items()}
    state, metrics = parts.step(state, place(rows, parts.batch))
    losses.append(float(metrics['train/loss']))
  return np.array(losses), state


def test_every_mesh_trains_alike_with_the_projection_taken():
  c = tiny_config(name='galore', learning_rate=0.01, rank=8, refresh_every=5)
  results = {name: run(c, axes) for name, axes in MESHES.items()}
  losses, state = results['one']
  assert (
    losses[-1] < losses[0] - 0.5
  )  # It learns, so that equal losses are not equal by standing still.
  shapes = {x.shape for x in jax.tree.leaves(state['opt'])}
  assert (2, 8, 176) in shapes  # [L, r, n], the moments of mlp/gate [L, 64, 176]: rank 8 of 64.
  for name, (other, _) in results.items():
    np.testing.assert_allclose(other, losses, rtol=1e-5, err_msg=name)


def test_state_is_sharded_like_its_parameter_and_donated():
  c = tiny_config(name='galore', learning_rate=0.01, rank=8, refresh_every=5)
  mesh = sharding.make_mesh(1, 8, 1)
  parts = build.build(c, mesh)
  compiled = parts.step.lower(parts.state, parts.batch).compile()
  shardings = jax.tree.map(lambda x: x.sharding, parts.state)
  plan.check_donated(compiled, parts.state)
  # All matrices of the tiny model divide by 8, so what is left whole on each device is small
  # vectors and counts.
  whole = sharding.bytes_per_device(
    parts.state, jax.tree.map(lambda x: shardings['step'], parts.state)
  )
  assert sharding.bytes_per_device(parts.state, shardings) < 1.1 * whole / 8

  state = parts.init(jax.random.key(0))
  batch = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), parts.batch)
  before = {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
  leaves = jax.tree.leaves(state)
  state, _ = compiled(state, batch)
  assert all(x.is_deleted() for x in leaves)
  after = {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
  assert after == before


def test_a_step_that_does_not_donate_is_refused():
  c = tiny_config(name='adamw', learning_rate=0.01)
  parts = build.build(c, sharding.make_mesh(1, 8, 1))
  step = whole_tree.make_train_step(parts.model.loss, parts.transform)
  compiled = jax.jit(step).lower(parts.state, parts.batch).compile()
  with pytest.raises(ValueError, match='donate_argnums'):
    plan.check_donated(compiled, parts.state)


def two_matrices_loss(params, batch):
  hidden = params['a'][batch['tokens']]
  out = jnp.tanh(hidden @ params['b']) @ params['c']
  error = out - batch['targets'][..., None]
  return jnp.sum(batch['weights'][..., None] * error**2), jnp.sum(batch['weights'])


def projected_run(accumulate, accumulate_in, steps=5, refresh_every=1000):
  """Parameters and state after steps on batches of 8 rows, GaLore of rank 3 on the matrix b."""
  rng = np.random.default_rng(1)
  params = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}
  transform = optax.chain(
    transforms.project(optax.scale_by_adam(), 3, refresh_every=refresh_every, targets='b'),
    optax.scale(-0.01),
  )
  options = dict(accumulate=accumulate, accumulate_in=accumulate_in)
  step = jax.jit(whole_tree.make_train_step(two_matrices_loss, transform, **options))
  state = whole_tree.init_state(lambda key: params, transform, jax.random.key(0))
  for _ in range(steps):
    state, metrics = step(state, linear_batch() | {'weights': np.ones((8, 4), np.float32)})
  return state, metrics


SHAPES = {'a': (9, 6), 'b': (6, 10), 'c': (10, 1)}


def test_one_batch_accumulates_in_the_subspace_to_the_ordinary_step():
  one, metrics = projected_run(1, 'subspace', refresh_every=2)
  other, _ = projected_run(1, 'weights', refresh_every=2)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), one, other)
  assert 0 < float(metrics['train/grad_norm']) < np.inf


@pytest.mark.slow
def test_the_subspace_adds_up_what_its_basis_sees_of_each_micro_batch():
  """By hand: the basis of the first micro-batch's gradient, Adam on the projected mean."""
  state, _ = projected_run(4, 'subspace', steps=1)
  rng = np.random.default_rng(1)
  params = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}
  batch = linear_batch() | {'weights': np.ones((8, 4), np.float32)}
  total = lambda p, b: two_matrices_loss(p, b)[0] / 32
  first = jax.grad(total)(params, jax.tree.map(lambda x: x[0::4], batch))['b']
  whole = jax.grad(total)(params, batch)['b']
  basis = state['opt'][0].left['b']
  captured = np.linalg.norm(basis.T @ first) / np.linalg.norm(np.linalg.svd(first)[1][:3])
  assert captured > 0.999  # The span of the first gradient's singular vectors, not of the mean's.
  answer = np.asarray(basis.T @ whole)
  answer = 0.01 * 1.0 * answer / (np.abs(answer) + 1e-8)  # Adam's first step.
  np.testing.assert_allclose(state['params']['b'], params['b'] - basis @ answer, atol=2e-6)


@pytest.mark.slow
def test_accumulating_in_the_subspace_keeps_no_f32_sum_of_the_gradients():
  fields = dict(model='llama_tiny', accumulate=4, clip_norm=0.0, param_dtype='bfloat16')
  temporaries = {}
  for where in whole_tree.ACCUMULATIONS:
    c = config.load('configs/quickstart.py:smoke').unlock()
    c.update(fields | {'accumulate_in': where, 'model_args': {'vocab': 256, 'intermediate': 4096}})
    parts = build.build(c, sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    compiled = parts.step.lower(parts.state, parts.batch).compile()
    temporaries[where] = compiled.memory_analysis().temp_size_in_bytes
  mlp = parts.state['params']['blocks']['mlp']
  matrices = sum(x.size for x in jax.tree.leaves(mlp))
  # In place of 64 rows the sum has 8.
  assert temporaries['weights'] - temporaries['subspace'] > 4 * matrices * (1 - 8 / 64) * 0.9


@pytest.mark.parametrize(
  ('options', 'says'),
  [
    (dict(accumulate_in='basis'), "'weights' or 'subspace'; got 'basis'"),
    (dict(accumulate_in='subspace', clip_norm=1.0), 'set clip_norm=0'),
  ],
)
def test_refuses_what_accumulation_cannot_do(options, says):
  with pytest.raises(ValueError, match=says):
    whole_tree.make_train_step(linear_loss, optax.sgd(0.1), **options)


def test_a_transform_without_a_subspace_accumulates_none():
  step = whole_tree.make_train_step(linear_loss, optax.sgd(0.1), accumulate_in='subspace')
  with pytest.raises(ValueError, match='no subspace'):
    jax.eval_shape(step, linear_state(optax.sgd(0.1)), linear_batch())
