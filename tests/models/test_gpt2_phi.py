"""GPT-2's and Phi's forward passes against float64 references, and under padding and a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_families import gpt2_logits, phi_logits
from tiny import assert_gradients_close, batch_of, random_params

from memjax import sharding
from memjax.models import create

SMALL = dict(vocab=64, hidden=32, intermediate=48)
MODELS = {
  'gpt2': (lambda: create('gpt2_tiny', positions=12, **SMALL), gpt2_logits),
  'phi': (lambda: create('phi_tiny', rotary_dim=4, kv_heads=2, **SMALL), phi_logits),
}


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize('name', MODELS)
def test_logits_equal_the_float64_reference_with_padding_on_either_side(name):
  make, reference = MODELS[name]
  model = make()
  params = random_params(model)
  tokens = np.array(batch_of(model, (3, 9))['tokens'])
  mask = np.ones_like(tokens)
  mask[1, :3], mask[2, 6:] = 0, 0
  got = jax.jit(model.logits)(params, jnp.asarray(tokens), jnp.asarray(mask))
  for row, kept, ours in zip(tokens, mask == 1, got):
    expected = reference(model, float64(params), row[kept])
    # f32 rounding through two layers.
    np.testing.assert_allclose(ours[kept], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_gradients_reach_every_leaf_and_a_mesh_changes_none(name):
  plain = MODELS[name][0]()
  params, batch = random_params(plain), batch_of(plain, (2, 8))
  mean = lambda model: lambda params: jnp.divide(*model.loss(params, batch))
  loss, grads = jax.jit(jax.value_and_grad(mean(plain)))(params)
  size = jax.tree.map(lambda g: float(jnp.abs(g).max()), grads)
  size['blocks']['attn']['k'].pop('bias')  # Shifts every score of a query alike where unrotated.
  assert min(jax.tree.leaves(size)) > 1e-4

  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  model = MODELS[name][0]()
  model = create(
    f'{name}_tiny',
    **{k: v for k, v in vars(model).items() if k != 'activations'},
    activations=sharding.batch_sharding(mesh),
  )
  where = sharding.param_shardings(params, model.SHARDING, mesh)
  placed = jax.device_put(params, where)
  kernel = placed['blocks']['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  got, sharded = jax.jit(jax.value_and_grad(mean(model)))(placed)
  np.testing.assert_allclose(got, loss, rtol=1e-6)
  assert_gradients_close(sharded, grads, 1e-5)  # f32 sums in another order.


def test_sizes_of_the_released_models():
  """As the model cards count them, the tied head once."""
  assert create('gpt2').num_params() == 124_439_808
  assert create('gpt2_xl').num_params() == 1_557_611_200
  assert create('phi_2').num_params() == 2_779_683_840


def test_bad_sizes_are_refused():
  with pytest.raises(ValueError, match='rotary_dim 3 is no even number'):
    create('phi_tiny', rotary_dim=3)
  with pytest.raises(ValueError, match='not a multiple of kv_heads'):
    create('phi_tiny', kv_heads=3)
  model = MODELS['gpt2'][0]()
  with pytest.raises(ValueError, match='has 12 positions'):
    jax.eval_shape(model.embed, model.abstract(), jnp.zeros((1, 13), jnp.int32))
