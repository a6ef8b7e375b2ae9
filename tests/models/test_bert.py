"""Encoders and their heads against a float64 reference; padding, losses, meshes, adapters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_families import bert_logits
from tiny import assert_gradients_close, random_params

from memjax import adapters, sharding, weights
from memjax.models import create
from memjax.steps import whole_tree

SMALL = dict(vocab=64, hidden=32, intermediate=48, positions=16)
ROBERTA = dict(types=1, offset=2, pad_id=1, norm_eps=1e-5)
FORMS = {
  'classification': dict(labels=3),
  'roberta': dict(labels=3, **ROBERTA),
  'mean_pool': dict(pool='mean'),
  'regression': dict(task='regression'),
  'span': dict(task='span', **ROBERTA),
  'embedding': dict(task='embedding', pool='mean'),
}
ROWS, LENGTH = 3, 9


def make(**fields):
  return create('bert_tiny', **SMALL, **fields)


def inputs(model, seed=0):
  """Ragged rows: the second padded on the left, the third on the right."""
  rng = np.random.default_rng(seed)
  draw = lambda high: rng.integers(0, high, (ROWS, LENGTH), dtype=np.int32)
  mask = np.ones((ROWS, LENGTH), np.int32)
  mask[1, :4], mask[2, 6:] = 0, 0
  return draw(model.vocab), mask, draw(model.types)


def labels(model, seed=1):
  """Within what is not padding."""
  rng = np.random.default_rng(seed)
  if model.task == 'regression':
    return rng.standard_normal(ROWS).astype(np.float32)
  if model.task == 'span':
    return np.array([[1, 3], [5, 8], [0, 4]], np.int32)
  return rng.integers(0, model.labels, ROWS, dtype=np.int32)


def batch_of(model):
  tokens, mask, types = inputs(model)
  rows = {'tokens': tokens, 'attention_mask': mask, 'labels': labels(model), 'token_types': types}
  rows['weights'] = np.array([1, 0.5, 1], np.float32)
  return jax.tree.map(jnp.asarray, rows)


def expected(model, params):
  """The reference's logits of each row without its padding, and where they belong."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for tokens, mask, types in zip(*inputs(model)):
    kept = mask == 1
    yield bert_logits(model, params, tokens[kept], types[kept]), kept


@pytest.mark.parametrize('form', FORMS)
def test_logits_equal_the_float64_reference_without_padding(form):
  model = make(**FORMS[form])
  params = random_params(model)
  got = jax.jit(model.logits)(params, *map(jnp.asarray, inputs(model)))
  assert got.dtype == jnp.float32
  for ours, (theirs, kept) in zip(got, expected(model, params)):
    ours = ours[kept] if model.task == 'span' else ours
    assert ours.shape == theirs.shape
    # f32 rounding through two layers.
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_the_loss_is_that_of_the_reference_logits():
  logsumexp = lambda z: math.log(np.exp(z).sum())
  of_row = {
    'classification': lambda z, y, _: logsumexp(z) - z[y],
    'regression': lambda z, y, _: (z - y) ** 2,
    # Labels count places of the padded row.
    'span': lambda z, y, kept: np.mean(
      [logsumexp(z[:, i]) - z[y[i] - np.argmax(kept), i] for i in (0, 1)]
    ),
  }
  for form in ('classification', 'regression', 'span'):
    model = make(**FORMS[form])
    params, batch = random_params(model), batch_of(model)
    total, count = jax.jit(model.loss)(params, batch)
    rows = zip(expected(model, params), labels(model), np.asarray(batch['weights']))
    theirs = sum(float(w * of_row[model.task](z, y, kept)) for (z, kept), y, w in rows)
    np.testing.assert_allclose(total, theirs, rtol=1e-5)
    assert float(count) == 2.5


def test_rows_without_weight_and_padded_columns_change_no_loss_and_no_gradient():
  model = make(**FORMS['span'])
  params, batch = random_params(model), batch_of(model)
  mean = jax.jit(jax.value_and_grad(lambda p, b: jnp.divide(*model.loss(p, b))))
  wider = {
    k: jnp.pad(v, ((0, 1), (0, 2 * (v.ndim == 2 and v.shape[1] == LENGTH))))
    for k, v in batch.items()
    if v.ndim == 2
  }
  wider['weights'] = jnp.pad(batch['weights'], (0, 1))
  (loss, grads), (padded_loss, padded) = mean(params, batch), mean(params, wider)
  np.testing.assert_allclose(padded_loss, loss, rtol=1e-6)
  assert_gradients_close(padded, grads, 1e-5)  # f32 sums in another order.


@pytest.mark.slow
def test_gradients_reach_every_leaf_and_a_mesh_changes_none():
  plain = make(**FORMS['classification'])
  params, batch = random_params(plain), batch_of(plain)
  batch = {k: jnp.concatenate([v, v[:1]]) for k, v in batch.items()}  # Four rows for the mesh.
  mean = lambda model: jax.jit(jax.value_and_grad(lambda p: jnp.divide(*model.loss(p, batch))))
  loss, grads = mean(plain)(params)
  size = jax.tree.map(lambda g: float(jnp.abs(g).max()), grads)
  size['blocks']['attn']['k'].pop('bias')  # Shifts every score of a query alike.
  assert min(jax.tree.leaves(size)) > 1e-4

  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  model = dataclasses.replace(plain, activations=sharding.batch_sharding(mesh))
  placed = jax.device_put(params, sharding.param_shardings(params, model.SHARDING, mesh))
  kernel = placed['blocks']['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  got, sharded = mean(model)(placed)
  np.testing.assert_allclose(got, loss, rtol=1e-6)
  assert_gradients_close(sharded, grads, 1e-5)  # f32 sums in another order.


@pytest.mark.slow
def test_adapted_leaves_train_and_the_others_stay():
  """Adam on factors of rank 2 and on the head fits three rows."""
  model = make(pool='mean')
  params = jax.jit(model.init)(jax.random.key(0))
  spec = adapters.LoRA(rank=2, rest='^head/')
  start = adapters.attach(params, spec, jax.random.key(1))
  batch = {k: v for k, v in batch_of(model).items() if k != 'token_types'}
  transform = optax.adam(0.02)
  state = {'step': jnp.int32(0), 'params': start, 'opt': transform.init(weights.trained(start))}
  step = jax.jit(whole_tree.make_train_step(model.loss, transform))
  losses = []
  for _ in range(30):
    state, metrics = step(state, batch)
    losses.append(float(metrics['train/loss']))
  assert losses[0] > 0.6
  assert losses[-1] < 0.05
  before, after = (adapters.detach(x) for x in (start, state['params']))
  assert (before['embed']['embedding'] == after['embed']['embedding']).all()
  assert (before['blocks']['mlp']['up']['kernel'] == after['blocks']['mlp']['up']['kernel']).all()
  assert not (before['head']['out']['kernel'] == after['head']['out']['kernel']).all()


def test_a_batch_is_what_it_says():
  for form, fields in FORMS.items():
    if form == 'embedding':
      continue
    model = make(**fields)
    batch = batch_of(model)
    shapes = model.batch_shapes(ROWS, LENGTH)
    assert {k: (batch[k].shape, batch[k].dtype) for k in shapes} == {
      k: (v.shape, v.dtype) for k, v in shapes.items()
    }
    total, count = jax.eval_shape(model.loss, model.abstract(), shapes)
    assert total.shape == count.shape == ()


def test_sizes_of_the_released_models():
  """BERT base as its authors count it, with the pooler, plus two labels; RoBERTa the same way."""
  assert create('bert_base').num_params() == 109_482_240 + 2 * 769
  assert create('roberta_base').num_params() == 124_055_040 + 768 * 769 + 2 * 769
  assert create('minilm_l6').num_params() == 22_713_216 - 384 * 385  # Without the pooler.


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="the nearest is 'span'"):
    make(task='spam')
  with pytest.raises(ValueError, match='pool'):
    make(pool='last')
  with pytest.raises(ValueError, match='labels is 0'):
    make(labels=0)
  with pytest.raises(ValueError, match='16 positions'):
    jax.eval_shape(make().logits, make().abstract(), jnp.zeros((1, 17), jnp.int32))
  model = make(task='embedding')
  with pytest.raises(ValueError, match='no labels'):
    jax.eval_shape(model.loss, model.abstract(), model.batch_shapes(2, 8))
