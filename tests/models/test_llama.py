"""The forward pass against a float64 reference, and what the model promises about its pieces."""

import dataclasses
import operator
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_llama import logits as reference_logits
from tiny import assert_trees_close, batch_of, make, random_params

from memjax.models import Llama, create
from memjax.models.attention import choose
from memjax.models.rotary import RopeScaling

VARIANTS = {
  'plain': {},
  'tied': dict(tied=True),
  'wide_heads': dict(head_dim=24, kv_heads=1),
  'qkv_bias': dict(qkv_bias=True),
  'qk_norm': dict(qk_norm=True, kv_heads=1),
  'window': dict(window=3),
  'scaled_rope': dict(rope_theta=100.0, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32)),
}


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_equal_the_float64_reference(name):
  model = make(**VARIANTS[name])
  params = random_params(model)
  tokens = np.asarray(batch_of(model, (2, 9))['tokens'])
  scaling = (4.0, 1.0, 4.0, 32) if name == 'scaled_rope' else None
  expected = np.stack([reference_logits(model, float64(params), t, scaling) for t in tokens])
  got = jax.jit(model.logits)(params, tokens)
  assert got.dtype == jnp.float32
  # f32 rounding through two layers.
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
  if scaling:  # The scaling must have had an effect to be tested.
    unscaled = reference_logits(model, float64(params), tokens[0])
    assert np.abs(unscaled - expected[0]).max() > 1e-2


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_does_not_change_logits(side):
  model = make()
  params = random_params(model)
  tokens = np.asarray(batch_of(model, (1, 6))['tokens'])
  pad, mask = np.full((1, 3), 7), np.ones((1, 6), np.int32)
  order = (lambda a, b: [a, b]) if side == 'left' else (lambda a, b: [b, a])
  padded = np.concatenate(order(pad, tokens), 1)
  mask = np.concatenate(order(np.zeros((1, 3), np.int32), mask), 1)
  got = model.logits(params, jnp.asarray(padded), jnp.asarray(mask))[0][mask[0] == 1]
  expected = reference_logits(model, float64(params), tokens[0])
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_later_tokens_do_not_change_earlier_logits():
  model = make()
  params = random_params(model)
  tokens = batch_of(model, (1, 8))['tokens']
  logits = jax.jit(model.logits)
  changed = logits(params, tokens.at[0, 5].set((tokens[0, 5] + 1) % model.vocab))
  same = np.asarray(logits(params, tokens) == changed).all(-1)[0]
  np.testing.assert_array_equal(same, np.arange(8) < 5)


def test_loss_is_the_mean_of_reference_cross_entropies():
  model = make()
  params, batch = random_params(model), batch_of(model, (2, 9))
  total, count = jax.jit(model.loss)(params, batch)
  expected = 0.0
  columns = (np.asarray(batch[name]) for name in ('tokens', 'targets', 'weights'))
  for tokens, targets, weights in zip(*columns):
    logits = reference_logits(model, float64(params), tokens)
    log_sum = np.log(np.exp(logits).sum(-1))
    expected += (weights * (log_sum - logits[np.arange(9), targets])).sum()
  assert count == batch['weights'].sum()
  np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_scan_equals_a_loop_over_the_three_pieces():
  model = make()
  params, batch = random_params(model), batch_of(model, (2, 9))

  def by_hand(params):
    x = model.embed({'embed': params['embed']}, batch['tokens'])
    for i in range(model.layers):
      layer = jax.tree.map(operator.itemgetter(i), params['blocks'])
      x = model.block(layer, x)
    rest = {key: params[key] for key in ('final_norm', 'head')}
    return model.head_loss(rest, x, batch['targets'], batch['weights'])[0]

  loss, grad = jax.jit(jax.value_and_grad(lambda p: model.loss(p, batch)[0]))(params)
  loss_by_hand, grad_by_hand = jax.jit(jax.value_and_grad(by_hand))(params)
  np.testing.assert_allclose(loss, loss_by_hand, rtol=1e-6)
  assert_trees_close(grad, grad_by_hand, 1e-5)


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
  model, batch = make(), batch_of(make(), (2, 9))
  params = random_params(model)
  grads = {}
  for remat in ('none', 'dots', 'attention', 'full'):
    loss = dataclasses.replace(model, remat=remat).loss
    grads[remat] = jax.jit(jax.grad(lambda p, loss=loss: loss(p, batch)[0]))(params)
  for remat, grad in grads.items():
    # The same arithmetic, fused differently.
    assert_trees_close(grad, grads['none'], 1e-6 if remat == 'none' else 1e-5)


def test_rematerialisation_saves_what_it_says():
  """Bytes a layer kept for the backward pass, read off the residuals of the scan over layers."""
  model, (rows, length) = make(layers=3), (2, 8)
  hidden = jax.ShapeDtypeStruct((rows, length, model.hidden), jnp.float32)

  def residuals(remat):
    blocks = dataclasses.replace(model, remat=remat).blocks
    params = model.abstract()['blocks']
    _, vjp = jax.eval_shape(lambda p, x: jax.vjp(blocks, p, x), params, hidden)
    stacked = [x for x in jax.tree.leaves(vjp) if x.shape[:1] == (3,) and rows in x.shape[1:2]]
    return sum(x.size // 3 for x in stacked)

  tokens = rows * length
  attention = 2 * tokens * model.head_dim * (model.heads + model.kv_heads)
  assert residuals('full') == tokens * model.hidden
  assert residuals('attention') == tokens * model.hidden + attention
  assert residuals('full') < residuals('attention') < residuals('dots') < residuals('none')


def test_tied_embedding_gets_both_gradients():
  tied = make(tied=True)
  untied = dataclasses.replace(tied, tied=False)
  params, batch = random_params(tied), batch_of(tied, (2, 9))
  both = {**params, 'head': {'kernel': params['embed']['embedding'].T}}
  grad = jax.jit(jax.grad(lambda p: tied.loss(p, batch)[0]))(params)['embed']['embedding']
  parts = jax.jit(jax.grad(lambda p: untied.loss(p, batch)[0]))(both)
  lookup, head = parts['embed']['embedding'], parts['head']['kernel'].T
  assert_trees_close(grad, lookup + head, 1e-5)
  assert min(jnp.abs(lookup).max(), jnp.abs(head).max()) > 1e-2


@pytest.mark.slow
def test_bfloat16_compute_is_close_and_keeps_f32_gradients():
  model = make()
  half = dataclasses.replace(model, dtype='bfloat16')
  params, batch = jax.tree.map(lambda x: x / 4, random_params(model)), batch_of(model, (2, 9))
  exact = model.loss(params, batch)[0]
  loss, grad = jax.jit(jax.value_and_grad(lambda p: half.loss(p, batch)[0]))(params)
  assert loss.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(grad)} == {jnp.dtype('float32')}
  # Logits are rounded to 8 bits of mantissa; the loss of small ones moves by less.
  np.testing.assert_allclose(loss, exact, rtol=2e-3)
  assert half.embed(params, batch['tokens']).dtype == jnp.bfloat16


def test_initial_values_are_addressed_by_path_and_layer():
  model = make(layers=2, intermediate=32, vocab=32, kv_heads=4)  # Few shapes to compile.
  params = jax.jit(model.init)(jax.random.key(3))
  assert_same_shapes(params, model.abstract())
  for path, leaf in jax.tree.leaves_with_path(params):
    if path[-1].key == 'scale':
      assert (leaf == 1).all()
    else:
      # Standard error of a standard deviation over n draws is std / sqrt(2 n); five of them.
      np.testing.assert_allclose(leaf.std(), 0.02, rtol=5 / np.sqrt(2 * leaf.size))
  deeper = dataclasses.replace(model, layers=4).init(jax.random.key(3))
  shallow = jax.tree.map(lambda leaf: leaf[:2], deeper['blocks'])
  jax.tree.map(np.testing.assert_array_equal, shallow, params['blocks'])
  q, o = (params['blocks']['attn'][name]['kernel'] for name in 'qo')
  assert not np.isclose(q[0], q[1]).all()
  assert not np.isclose(q, o).all()


@pytest.mark.slow
def test_initial_values_are_the_same_in_another_process():
  program = (
    'import jax; from memjax.models import create;'
    'p = create("llama_tiny", vocab=64, hidden=32, intermediate=48).init(jax.random.key(3));'
    'print(float(p["blocks"]["mlp"]["up"]["kernel"][1, 0, 0]))'
  )
  result = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  mine = make().init(jax.random.key(3))['blocks']['mlp']['up']['kernel'][1, 0, 0]
  assert float(result.stdout) == float(mine)


def test_7b_is_described_without_allocating():
  model = create('llama_7b', dtype='bfloat16', param_dtype='bfloat16')
  assert_same_shapes(jax.eval_shape(model.init, jax.random.key(0)), model.abstract())
  batch = {k: jax.ShapeDtypeStruct((1, 2048), jnp.int32) for k in ('tokens', 'targets')}
  batch['weights'] = jax.ShapeDtypeStruct((1, 2048), jnp.float32)
  grad = jax.eval_shape(jax.grad(model.loss, has_aux=True), model.abstract(), batch)[0]
  assert_same_shapes(grad, model.abstract())


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(heads=4, kv_heads=3), 'kv_heads 3'),
    (dict(hidden=30, heads=4), 'set head_dim'),
    (dict(head_dim=7), 'head_dim 7 is odd'),
    (dict(layers=0), 'layers 0'),
    (dict(attention='flash'), 'auto, xla, cudnn'),
    (dict(remat='dot'), "the nearest is 'dots'"),
  ],
)
def test_impossible_sizes_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    make(**fields)


def test_wrong_parameters_are_named():
  model = make()
  params = model.abstract()
  del params['blocks']['mlp']['up']
  params['blocks']['mlp']['bias'] = params['blocks']['mlp_norm']['scale']
  tokens = jnp.zeros((1, 4), jnp.int32)
  message = r"missing: \['mlp/up/kernel'\]; unexpected: \['mlp/bias'\]"
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.logits, params, tokens)


def test_model_is_a_static_argument():
  assert hash(make(dtype='bfloat16')) == hash(make(dtype=jnp.bfloat16))
  assert make() == Llama(64, 32, 48, heads=4, layers=2, kv_heads=2)


def test_attention_falls_back_to_xla_on_cpu():
  assert choose('auto', jnp.dtype('bfloat16'), 64) == 'xla'
  assert choose('cudnn', jnp.dtype('float32'), 64) == 'cudnn'


def assert_same_shapes(a, b):
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert describe(a) == describe(b)
