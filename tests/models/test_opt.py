"""OPT's forward pass against a float64 reference, its pieces, and the steps that train it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_opt import logits as reference_logits
from tiny import assert_trees_close, batch_of, random_params

from memjax import sharding
from memjax.models import OPT, create
from memjax.steps import layerwise, whole_tree

VARIANTS = {
  'pre_norm': {},
  'post_norm': dict(pre_norm=False, embed_dim=16),  # The 350M model's form.
  'untied': dict(tied=False),
}


def make(**overrides):
  sizes = dict(vocab=64, hidden=32, intermediate=48, positions=12)
  return create('opt_tiny', **{**sizes, **overrides})


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_equal_the_float64_reference(name):
  model = make(**VARIANTS[name])
  params = random_params(model)
  tokens = np.asarray(batch_of(model, (2, 9))['tokens'])
  expected = np.stack([reference_logits(model, float64(params), t) for t in tokens])
  got = jax.jit(model.logits)(params, tokens)
  assert got.dtype == jnp.float32
  # f32 rounding through two layers.
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_does_not_change_logits(side):
  model = make()
  params = random_params(model)
  tokens = np.asarray(batch_of(model, (1, 6))['tokens'])
  pad, ones = np.full((1, 3), 7), np.ones((1, 6), np.int32)
  order = (lambda a, b: [a, b]) if side == 'left' else (lambda a, b: [b, a])
  padded = np.concatenate(order(pad, tokens), 1)
  mask = np.concatenate(order(np.zeros((1, 3), np.int32), ones), 1)
  got = model.logits(params, jnp.asarray(padded), jnp.asarray(mask))[0][mask[0] == 1]
  expected = reference_logits(model, float64(params), tokens[0])
  np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pre_norm', 'post_norm'])
def test_layer_by_layer_equals_the_whole_tree(name):
  """One update by plain descent: the parameters' change is the gradient."""
  model = make(**VARIANTS[name])
  params, batch = random_params(model), batch_of(model, (2, 9))
  transform = optax.sgd(0.1)
  state = {'step': jnp.int32(0), 'params': params, 'opt': transform.init(params)}
  whole, metrics = jax.jit(whole_tree.make_train_step(model.loss, transform))(state, batch)
  layered, _ = jax.jit(layerwise.make_train_step(model, transform))(state, batch)
  assert_trees_close(layered['params'], whole['params'], 1e-6)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, whole['params'])
  # A bias of all keys shifts every score alike and has no gradient; rows of the table beyond the
  # sequence have none either, but others do.
  moved['blocks']['attn']['k'].pop('bias')
  assert min(jax.tree.leaves(moved)) > 1e-4
  total, count = jax.jit(model.loss)(params, batch)
  np.testing.assert_allclose(metrics['train/loss'], total / count, rtol=1e-6)


def test_initial_values():
  params = jax.jit(make(hidden=64, vocab=128).init)(jax.random.key(3))
  for path, leaf in jax.tree.leaves_with_path(params):
    if path[-1].key in ('scale', 'bias'):
      assert (leaf == (path[-1].key == 'scale')).all()
    else:
      # Standard error of a standard deviation over n draws is std / sqrt(2 n); five of them.
      np.testing.assert_allclose(leaf.std(), 0.02, rtol=5 / np.sqrt(2 * leaf.size))


def test_a_mesh_changes_no_loss():
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  plain = make()
  model = make(activations=sharding.batch_sharding(mesh))
  params, batch = random_params(plain), batch_of(plain, (2, 8))
  where = sharding.param_shardings(params, OPT.SHARDING, mesh)
  placed = jax.device_put(params, where)
  kernel = placed['blocks']['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  got = jax.jit(model.loss)(placed, batch)[0]
  np.testing.assert_allclose(got, jax.jit(plain.loss)(params, batch)[0], rtol=1e-6)


def test_bad_sizes_are_refused():
  with pytest.raises(ValueError, match='not a multiple of heads'):
    make(heads=5)
  with pytest.raises(ValueError, match='layers is 0'):
    make(layers=0)
  with pytest.raises(ValueError, match='has 12 positions'):
    jax.eval_shape(make().embed, make().abstract(), jnp.zeros((1, 13), jnp.int32))
