"""Backpropagation for the last layers, estimates for the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import build, config, sharding, weights
from memjax.estimators import methods
from memjax.steps import hybrid, zeroth_order
from tests.models import tiny

MODEL = tiny.make(layers=3, tied=True, remat='none')
PARAMS = tiny.random_params(MODEL)
BATCH = tiny.batch_of(MODEL, (4, 8))
ESTIMATOR = methods.mezo(1e-3, 1e-2, noise='rademacher', form='weights')
SGD = optax.sgd(0.1)


def start(last=1):
  init = lambda key: jax.tree.map(jnp.copy, PARAMS)
  return hybrid.init_state(init, last, ESTIMATOR, SGD, jax.random.key(0))


@pytest.mark.slow
def test_the_last_layers_descend_the_gradient_and_the_others_an_estimate():
  state = start()
  step = jax.jit(hybrid.make_train_step(MODEL, ESTIMATOR, SGD))
  after, metrics = step(state, BATCH)
  mean = lambda params: MODEL.loss(params, BATCH)[0] / MODEL.loss(params, BATCH)[1]
  value, grads = jax.value_and_grad(mean)(PARAMS)
  np.testing.assert_allclose(metrics['train/loss'], value, rtol=1e-6)
  exact = hybrid.split(grads, 1)['exact']
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, state['params']['exact'], exact)
  tiny.assert_trees_close(after['params']['exact'], expected, 1e-5)

  # The others: MeZO on their parameters alone, the last layer in place.
  low, high = state['params']['estimated'], state['params']['exact']
  loss = lambda low, batch: hybrid.make_loss(MODEL)({'estimated': low, 'exact': high}, batch)
  alone = zeroth_order.make_train_step(loss, ESTIMATOR)
  zero = {'step': jnp.zeros((), jnp.int32), 'params': low, 'opt': ESTIMATOR.init(low)}
  moved, _ = jax.jit(alone)(zero, BATCH)
  tiny.assert_trees_close(after['params']['estimated'], moved['params'], 1e-6)
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), moved['params'], low)
  assert min(jax.tree.leaves(change)) > 1e-6


def test_parameters_are_split_and_joined():
  again = hybrid.join(hybrid.split(PARAMS, 2))
  jax.tree.map(np.testing.assert_array_equal, again, PARAMS)
  parts = hybrid.split(PARAMS, 2)
  np.testing.assert_allclose(
    hybrid.make_loss(MODEL)(parts, BATCH)[0], MODEL.loss(PARAMS, BATCH)[0], rtol=1e-6
  )


@pytest.mark.parametrize('last', [0, 3])
def test_both_kinds_have_layers(last):
  with pytest.raises(ValueError, match='take 1 to 2'):
    start(last)


class Broken:
  """The model, with a loss or gradient that is not finite in the pass asked for: they come in the
  order unperturbed, perturbed.
  """

  def __init__(self, where):
    self._where, self._passes = where, 0
    self.embed, self.blocks, self.tied = MODEL.embed, MODEL.blocks, MODEL.tied

  def head_loss(self, head, x, targets, mask):
    total, count = MODEL.head_loss(head, x, targets, mask)
    self._passes += 1
    exact = self._passes == 1
    if self._where == 'gradient' and exact:
      total += 0 * jnp.sqrt(0 * jnp.sum(x))  # Zero, of infinite slope.
    elif self._where == ('exact' if exact else 'estimated'):
      total += jnp.nan
    return total, count


@pytest.mark.slow
@pytest.mark.parametrize('where', ['exact', 'gradient', 'estimated'])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing(where):
  state = start()
  after, metrics = jax.jit(hybrid.make_train_step(Broken(where), ESTIMATOR, SGD))(state, BATCH)
  assert metrics['zo/skipped'] == metrics['zo/skipped_in_a_row'] == 1
  assert np.isfinite(metrics['train/loss']) == (where != 'exact')
  jax.tree.map(np.testing.assert_array_equal, after['params'], state['params'])
  jax.tree.map(np.testing.assert_array_equal, after['opt']['exact'], state['opt']['exact'])


@pytest.mark.slow
def test_a_config_trains_on_a_mesh_with_an_adapter():
  c = config.default()
  c.model, c.step, c.batch_size, c.seq_len = 'llama_tiny', 'hybrid', 8, 8
  c.model_args = dict(loss_chunk=64, vocab=64, layers=2, hidden=32, intermediate=48, kv_heads=4)
  c.schedule.warmup_ratio = 0.0
  c.optimizer = config.optimizer('mezo', learning_rate=1e-3, eps=0.1, noise='rademacher')
  c.hybrid.learning_rate = 1e-2
  c.adapter = config.adapter('lora', rank=4)
  parts = build.build(c, sharding.make_mesh(2, 2, 2))
  state = parts.init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 64, (8, 9), np.int32)
  batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones((8, 8), 'f')}
  batch = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), batch, parts.batch)
  losses = []
  for _ in range(4):
    state, metrics = parts.step(state, batch)
    losses.append(float(metrics['train/loss']))
  assert losses[-1] < losses[0] - 1e-3
  total = parts.eval_step(state['params'], batch)[0]
  view = parts.view(state['params'])
  np.testing.assert_allclose(total, jax.jit(parts.model.loss)(view, batch)[0], rtol=1e-5)
  assert weights.is_weight(view['blocks']['attn']['q']['kernel'])
