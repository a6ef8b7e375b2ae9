"""Adam-mini, Muon and Lion: known trajectories, blocks, and what optax's do differently."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import memjax
from memjax import compat, models, optimizers
from tests.transforms import golden
from tests.transforms.test_factored import check

# Matrix by its official name -> trajectory of the official package, run in NumPy: `w` is a PyTorch
# weight [4, 6], two heads of two rows each.
ADAM_MINI = {
  'wq': {
    1: (0.0769606, -0.0752931, -0.013011, None, None),
    10: (0.0169521, 0.0189058, 0.106261, None, None),
    100: (0.0241416, -0.0120079, 0.246802, None, None),
  },
  'feed_forward': {
    1: (0.0730971, -0.0772677, -0.014398, None, None),
    10: (-0.0169319, 0.0090251, 0.139212, None, None),
    100: (-0.0058941, -0.0185840, 0.300473, None, None),
  },
  'unmatched': {  # And a bias, of which every number has its own second moment.
    1: (0.0799451, -0.0709017, 0.001231, 0.0400000, 0.008209),
    10: (0.0437527, 0.0494763, 0.138796, -0.0029065, 0.330688),
    100: (0.0480027, 0.0096758, 0.222783, 0.0451655, 0.367026),
  },
}


@pytest.mark.parametrize('name', ADAM_MINI)
def test_adam_mini_gives_the_golden_values(name):
  called = lambda path: 'bias' if path == 'b' else path
  optimizer = compat.adam_mini(1e-2, dim=12, n_heads=12, name=called)
  expected = ADAM_MINI[name]
  check(golden.trajectory(optimizer, max(expected), transpose=True, name=name), expected)


def test_adam_mini_decays_all_but_norms_and_biases():
  optimizer = compat.adam_mini(1e-2, weight_decay=0.1, dim=12, n_heads=12)
  found = golden.trajectory(optimizer, 100, transpose=True, name='feed_forward')
  check(
    found,
    {
      1: (0.0730129, -0.0771771, -0.014405, None, None),
      10: (-0.0172578, 0.0093547, 0.139110, None, None),
      100: (-0.0057579, -0.0171758, 0.280279, None, None),
    },
  )


def test_blocks_of_one_number_are_adam():
  ones = memjax.adam_mini(1e-2, partition=lambda _, leaf: (1,) * leaf.ndim)
  found = golden.trajectory(ones, 10)
  # optax computes 1 - 0.999**t in f32, which is good to five digits.
  np.testing.assert_allclose(found, golden.trajectory(optax.adam(1e-2), 10), rtol=2e-5, atol=2e-6)


def test_any_blocks_that_divide_have_their_own_mean():
  """Tiles, which neither axis keeps whole."""
  transform = memjax.scale_by_adam_mini(partition=lambda *_: (1, 2, 3), b1=0.0, b2=0.0)
  gradient = {'w': jnp.asarray(np.random.default_rng(0).standard_normal((5, 4, 6)), jnp.float32)}
  updates, state = jax.jit(transform.update)(gradient, transform.init(gradient))
  assert state.nu['w'].shape == (5, 2, 2)
  tiles = np.square(gradient['w']).reshape(5, 2, 2, 2, 3).mean((2, 4))
  np.testing.assert_allclose(state.nu['w'], tiles, rtol=1e-6)
  roots = np.sqrt(np.kron(tiles, np.ones((1, 2, 3))))
  np.testing.assert_allclose(updates['w'], gradient['w'] / roots, rtol=1e-5)


def test_a_models_blocks_are_its_heads_neurons_and_tokens():
  model = models.create('llama_tiny')  # 4 heads and 2 key-value heads of width 16; 2 layers.
  state = jax.eval_shape(memjax.scale_by_adam_mini(head_dim=16).init, model.abstract())
  shapes = jax.tree.map(lambda x: x.shape, state.nu)
  assert shapes['embed']['embedding'] == (512, 1)
  assert shapes['head']['kernel'] == (1, 512)
  attention = {name: leaf['kernel'] for name, leaf in shapes['blocks']['attn'].items()}
  assert attention == {'q': (2, 1, 4), 'k': (2, 1, 2), 'v': (2, 1, 32), 'o': (2, 1, 64)}
  mlp = {name: leaf['kernel'] for name, leaf in shapes['blocks']['mlp'].items()}
  assert mlp == {'gate': (2, 1, 176), 'up': (2, 1, 176), 'down': (2, 1, 64)}
  assert shapes['blocks']['attn_norm']['scale'] == (2, 1)
  assert shapes['final_norm']['scale'] == (1,)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: memjax.scale_by_adam_mini(), r'attn/q/kernel: .*head_dim=None'),
    (lambda: memjax.scale_by_adam_mini(head_dim=5), r'attn/q/kernel: shape \(2, 8, 12\).*=5'),
    (
      lambda: memjax.scale_by_adam_mini(partition=lambda *_: (1, 3, 1)),
      r'attn/q/kernel: shape \(2, 8, 12\).*blocks of shape \(1, 3, 1\)',
    ),
    (lambda: memjax.scale_by_adam_mini(head_dim=4, partition=lambda *_: (1,)), 'not both'),
    (lambda: compat.adam_mini(dim=8, n_heads=3), r'attn/q/kernel: .*= 21'),
    (lambda: compat.adam_mini(n_heads=8, n_kv_heads=3), 'n_kv_heads=3'),
  ],
)
def test_heads_that_do_not_fit_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make().init({'attn': {'q': {'kernel': jnp.zeros((2, 8, 12))}}})


def test_muon_gives_optax_s_values_on_a_matrix():
  found = golden.trajectory(memjax.muon(1e-2), 100)
  expected = {
    1: (0.0772779, -0.0837543, -0.006632, 0.0352633, 0.017683),
    2: (0.0709302, -0.0760216, -0.011522, None, None),
    10: (0.0365320, -0.0319116, 0.214846, None, None),
  }
  for update, row in expected.items():
    known = [value for value in row if value is not None]
    # Five rounds of three products each amplify rounding by 3.4 a round.
    np.testing.assert_allclose(found[update - 1, : len(known)], known, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize('shape', [(3, 8, 12), (3, 12, 8)], ids=['wide', 'tall'])
def test_muon_makes_singular_values_about_one(shape):
  rng = np.random.default_rng(0)
  gradient = {
    'w': jnp.asarray(rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3), jnp.float32)
  }
  transform = memjax.scale_by_muon()
  updates, _ = jax.jit(transform.update)(gradient, transform.init(gradient))
  values = np.linalg.svd(updates['w'], compute_uv=False) / max(1, shape[-1] / shape[-2]) ** 0.5
  assert values.max() < 1.25
  assert values.min() > 0.4
  # The same singular vectors: gradient^T update is symmetric and positive.
  product = np.matmul(np.swapaxes(np.float64(gradient['w']), -1, -2), np.float64(updates['w']))
  asymmetry = np.abs(product - np.swapaxes(product, -1, -2)).max() / np.abs(product).max()
  assert asymmetry < 1e-4


def test_muon_takes_stacked_kernels_and_leaves_stacked_norms_to_adam():
  params = {'q': {'kernel': jnp.ones((2, 4, 6))}, 'norm': {'scale': jnp.ones((2, 6))}}
  ours = memjax.muon(1e-2).init(params)
  assert ours.inner_states['muon'].inner_state[0].mu['q']['kernel'].shape == (2, 4, 6)
  assert isinstance(ours.inner_states['muon'].inner_state[0].mu['norm']['scale'], optax.MaskedNode)
  theirs = optax.contrib.muon(1e-2).init(params)
  assert isinstance(theirs.inner_states['muon'].inner_state[0].mu['q']['kernel'], optax.MaskedNode)


def test_muon_refuses_vectors_by_name():
  with pytest.raises(ValueError, match=r'norm/scale: shape \(2, 6\) is no matrix'):
    memjax.scale_by_muon().init({'norm': {'scale': jnp.ones((2, 6))}})
  with pytest.raises(ValueError, match='targets'):
    memjax.muon(1e-2, targets='nothing').init({'w': jnp.ones((4, 4))})


def test_lion_gives_the_golden_values_and_stores_what_it_is_told():
  # The sign of the interpolated momentum is exact; f32 rounding of 100 sums remains.
  check(
    golden.trajectory(optimizers.OPTIMIZERS['lion'](1e-3, weight_decay=1e-3), 100),
    {
      1: (0.0831470, -0.0895577, 0.001423, None, None),
      10: (0.0761463, -0.0845570, 0.037423, None, None),
      100: (0.0781393, -0.0925491, 0.095417, None, None),
    },
  )
  params = {'w': jnp.ones((4, 6), jnp.bfloat16)}
  for dtype in ('float32', 'bfloat16'):
    state = optimizers.OPTIMIZERS['lion'](1e-3, mu_dtype=dtype).init(params)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype(dtype)}


@pytest.mark.parametrize('name', ['adam_mini', 'lion', 'muon'])
def test_factories_of_a_config_step_down_and_spare_norms_their_decay(name):
  arguments = {'head_dim': 3} if name == 'adam_mini' else {}
  optimizer = optimizers.OPTIMIZERS[name](lambda _: 1.0, weight_decay=0.1, **arguments)
  params = {'q': {'kernel': jnp.ones((2, 4, 6)), 'norm': {'scale': jnp.ones((2, 6))}}}
  update = jax.jit(lambda gradient: optimizer.update(gradient, optimizer.init(params), params)[0])
  still = update(jax.tree.map(jnp.zeros_like, params))
  np.testing.assert_allclose(still['q']['kernel'], -0.1, rtol=1e-6)
  np.testing.assert_array_equal(still['q']['norm']['scale'], 0)
  assert all(jnp.all(u < 0) for u in jax.tree.leaves(update(params)))
