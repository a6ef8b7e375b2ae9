"""The layer-by-layer step against the ordinary one, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import build, config, models, optimizers, plan, sharding
from memjax.evaluate import place
from memjax.steps import layerwise, slices, whole_tree

STEPS = 12


def tiny_config(optimizer, **changes):
  c = config.default()
  c.model, c.steps, c.batch_size, c.seq_len = 'llama_tiny', 2 * STEPS, 16, 16
  c.model_args = dict(loss_chunk=64, kv_heads=4, layers=3, **changes.pop('model_args', {}))
  c.schedule.warmup_ratio = 0.0
  c.optimizer = config.optimizer(**optimizer)
  c.update(changes)
  return c


def train(c, axes):
  """Returns the metrics of every step `[STEPS, 2]`, and the last state."""
  mesh = sharding.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
  parts = build.build(c, mesh)
  state = parts.init(build.root_key(c, 'params'))
  where = jax.tree.map(lambda x: x.sharding, state)
  step = parts.step.lower(parts.state, parts.batch).compile()
  plan.check_donated(step, parts.state)
  found = []
  for i in range(STEPS):
    tokens = np.random.default_rng(i).integers(0, 64, (c.batch_size, c.seq_len + 1), np.int32)
    weights = np.ones((c.batch_size, c.seq_len), np.float32)
    weights[::3, 5:] = 0  # Micro-batches do not count equally.
    rows = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': weights}
    read = lambda start, stop, rows=rows: {k: v[start:stop] for k, v in rows.items()}
    state, metrics = step(state, place(read, parts.batch))
    found.append([float(metrics['train/loss']), float(metrics['train/grad_norm'])])
  assert jax.tree.map(lambda x: x.sharding, state) == where
  return np.array(found), state


def assert_same_training(c, axes, tolerance):
  ordinary, layered = (train(c.copy_and_resolve_references(), axes) for c in _both(c))
  # It learns, so that equal losses are not equal by standing still.
  assert ordinary[0][-1, 0] < ordinary[0][0, 0] - 0.3
  np.testing.assert_allclose(layered[0], ordinary[0], rtol=2e-6)
  near = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())
  jax.tree.map(near, layered[1], ordinary[1])


def _both(c):
  for step in ('whole_tree', 'layerwise'):
    c.step = step
    yield c


# Differences are those of f32 sums in another order; Adam and the bases of a subspace enlarge them
# where a gradient is small or two singular values are close: 2e-5 and 1.4e-4 were seen.
@pytest.mark.parametrize(
  ('axes', 'optimizer', 'tolerance', 'changes'),
  [
    pytest.param(
      (1, 8, 1),
      dict(name='sgd', learning_rate=0.3),
      1e-5,
      dict(clip_norm=0.5, clip_by='layer', model_args=dict(tied=True)),
      id='fsdp-tied-clip-layer',
    ),
    pytest.param(
      (1, 1, 1),
      dict(name='adamw', learning_rate=0.003, weight_decay=0.1),
      1e-4,
      dict(accumulate=2, clip_norm=0.5, model_args=dict(tied=True)),
      id='tied-accumulate-clip-global',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      (1, 8, 1),
      dict(name='galore', learning_rate=0.01, rank=8, refresh_every=5, basis='svd'),
      5e-4,
      dict(clip_norm=0.2, clip_by='layer'),
      id='fsdp-galore-clip-layer',
      marks=pytest.mark.slow,
    ),
    pytest.param(
      (2, 2, 2),
      dict(name='adalomo', learning_rate=0.03),
      1e-5,
      dict(accumulate=2),
      id='mixed-adalomo-accumulate',
      marks=pytest.mark.slow,
    ),
  ],
)
def test_training_is_that_of_the_ordinary_step(axes, optimizer, tolerance, changes):
  assert_same_training(tiny_config(optimizer, **changes), axes, tolerance)


def test_bfloat16_weights_are_rounded_with_the_noise_of_the_ordinary_step():
  """Updates of a tenth of an ulp: nearest rounding moves nothing, other noise other weights."""
  params = {
    'embed': {'embedding': jnp.ones((4, 8), jnp.bfloat16)},
    'blocks': {'kernel': jnp.ones((3, 8, 64), jnp.bfloat16)},
    'head': {'kernel': jnp.ones((8, 4), jnp.bfloat16)},
  }
  transform = optax.chain(optax.stateless(lambda g, p: jax.tree.map(lambda x: 0 * x + 1, g)))
  transform = optax.chain(transform, optax.scale(-0.0004))
  batch = {
    'tokens': jnp.zeros((2, 3), jnp.int32),
    'targets': jnp.ones((2, 3), jnp.int32),
    'weights': jnp.ones((2, 3)),
  }

  class Model:
    tied = False

    def embed(self, params, tokens):
      return params['embed']['embedding'][tokens]

    def block(self, layer, x):
      return x + x @ layer['kernel'] @ layer['kernel'].T

    def head_loss(self, params, x, targets, weights):
      return jnp.sum((x @ params['head']['kernel']).astype(jnp.float32)), jnp.sum(weights)

    def loss(self, params, batch):
      x = self.embed(params, batch['tokens'])
      x, _ = jax.lax.scan(lambda x, layer: (self.block(layer, x), None), x, params['blocks'])
      return self.head_loss(params, x, batch['targets'], batch['weights'])

  state = whole_tree.init_state(lambda key: params, transform, jax.random.key(0))
  key = jax.random.key(1)
  steps = (
    whole_tree.make_train_step(Model().loss, transform, rounding_key=key),
    layerwise.make_train_step(Model(), transform, rounding_key=key),
  )
  ordinary, layered = (jax.jit(step)(state, batch)[0]['params'] for step in steps)
  kernels = np.asarray(ordinary['blocks']['kernel'], np.float32)
  assert 0.1 < np.mean(kernels != 1) < 0.3  # An ulp below 1 is 2**-8 / 2; 0.0004 is a fifth of it.
  assert np.any(kernels[0] != kernels[1])
  jax.tree.map(np.testing.assert_array_equal, layered, ordinary)


def test_another_layer_costs_its_input_and_no_gradient():
  """Temporary memory against depth: the slope is one hidden state a layer."""

  def temporary(step, layers):
    model = models.create('llama_tiny', hidden=128, layers=layers, remat='full', loss_chunk=64)
    transform = optax.sgd(0.1)
    init = lambda key: whole_tree.init_state(model.init, transform, key)
    state = jax.eval_shape(init, jax.random.key(0))
    token = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    batch = dict(tokens=token, targets=token, weights=jax.ShapeDtypeStruct((2, 16), jnp.float32))
    compiled = jax.jit(step(model, transform), donate_argnums=0).lower(state, batch).compile()
    plan.check_donated(compiled, state)
    return compiled.memory_analysis().temp_size_in_bytes, state

  few, state = temporary(layerwise.make_train_step, 4)
  many, _ = temporary(layerwise.make_train_step, 12)
  hidden = 4 * 2 * 16 * 128
  layer = sum(x.size * 4 for x in jax.tree.leaves(state['params']['blocks'])) // 4
  assert layer > 20 * hidden  # Else a gradient would not be seen beside a hidden state.
  assert many - few <= 1.1 * 8 * hidden
  ordinary = lambda model, transform: whole_tree.make_train_step(model.loss, transform)
  assert temporary(ordinary, 12)[0] > many + 7 * layer


PARAMS = {
  'embed': {'embedding': jnp.ones((8, 4))},
  'blocks': {'norm': {'scale': jnp.ones((3, 4))}, 'q': {'kernel': jnp.ones((3, 4, 4))}},
}


@pytest.mark.parametrize(
  ('transform', 'sentence'),
  [
    (optax.clip_by_global_norm(1.0), 'config.clip_norm'),
    (optax.MultiSteps(optax.sgd(0.1), 2), 'config.accumulate'),
    (optax.apply_if_finite(optax.sgd(0.1), 3), 'never holds all gradients'),
    (optax.add_noise(0.1, 0.5, 0), 'same in every layer'),
    # Factors [3, 4] as if layers were rows.
    (optax.scale_by_factored_rms(min_dim_size_to_factor=2), 'does not fall into 3 layers'),
  ],
  ids=['global_norm', 'multi_steps', 'apply_if_finite', 'noise', 'factored'],
)
def test_what_needs_more_than_a_layer_is_refused(transform, sentence):
  with pytest.raises(ValueError, match=sentence):
    slices.plan(optax.with_extra_args_support(transform), PARAMS)


def test_states_of_every_kind_are_told_apart():
  transform = optax.partition(
    {'adam': optax.inject_hyperparams(optax.adam)(0.1), 'sgd': optax.sgd(0.1, 0.9)},
    {'embed': 'sgd', 'blocks': {'norm': 'sgd', 'q': 'adam'}},
  )
  slots = slices.plan(optax.with_extra_args_support(transform), PARAMS)
  named = jax.tree_util.tree_leaves_with_path(transform.init(PARAMS))
  layered = {slot.owner for slot in slots if slot.layered}
  assert layered == {'blocks/norm/scale', 'blocks/q/kernel'}
  assert {slot.owner for slot in slots if not slot.layered} == {None, 'embed/embedding'}
  shared = [x.shape for (_, x), slot in zip(named, slots) if slot.owner is None]
  assert len(shared) > 2  # Counts and hyperparameters.
  assert set(shared) == {()}


# Optimizers that a layer-by-layer step refuses: none so far.
REFUSED = set()


@pytest.mark.parametrize('name', sorted(optimizers.OPTIMIZERS))
def test_optimizers_go_layer_by_layer(name):
  arguments = {'rank': 2} if 'rank' in optimizers.arguments(name) else {}
  arguments |= {'random_after': 10} if name == 'golore' else {}
  transform = optimizers.OPTIMIZERS[name](0.1, **arguments)
  transform = optax.with_extra_args_support(transform)
  if name in REFUSED:
    with pytest.raises(ValueError, match='layer'):
      slices.plan(transform, PARAMS)
    return
  slots = slices.plan(transform, PARAMS)
  leaves = jax.tree.leaves(jax.eval_shape(transform.init, PARAMS))
  shared = [x.shape for x, slot in zip(leaves, slots, strict=True) if slot.shared]
  assert set(shared) <= {()}  # Counts; all else is some layer's own.


def test_a_config_that_contradicts_itself_is_refused():
  c = tiny_config(dict(name='adamw', learning_rate=0.01), step='layerwise', remat='dots')
  with pytest.raises(ValueError, match='set config'):
    config.validate(c)
  c.remat, c.step = 'none', 'layer_wise'
  with pytest.raises(ValueError, match="the nearest is 'layerwise'"):
    config.validate(c)
