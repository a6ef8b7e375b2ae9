"""Restarts beside the official layer and scheduler, which are on GitHub alone:

pip install --no-deps git+https://github.com/Guitaricet/relora
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import adapters, schedules, weights

pytestmark = pytest.mark.parity
RNG = np.random.default_rng(0)
M, N, RANK, ALPHA = 12, 10, 3, 32
SPEC = adapters.ReLoRA(rank=RANK, alpha=ALPHA, every=2, prune='magnitude', ratio=0.8, apart=True)


def near(x, y):
  np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())


def test_values_gradients_and_a_merge_are_the_official_layers():
  torch = pytest.importorskip('torch')
  layers = pytest.importorskip('peft_pretraining.relora')
  w, a, b = (RNG.standard_normal(s).astype('f') for s in ((M, N), (M, RANK), (RANK, N)))
  x = RNG.standard_normal((5, M)).astype('f')
  layer = layers.ReLoRaLinear(M, N, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, bias=False)
  layer.weight.data = torch.tensor(w.T.copy())
  layer.lora_A.weight.data = torch.tensor(a.T.copy())
  layer.lora_B.weight.data = torch.tensor(b.T.copy())
  params = {'w': weights.Adapted(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b), scale=SPEC.scale)}

  out = layer(torch.tensor(x))
  out.square().sum().backward()

  def loss(values):
    y = weights.dot(jnp.asarray(x), weights.replaced(params, values)['w'])
    return jnp.sum(y**2), y

  grads, ours = jax.grad(loss, has_aux=True)(weights.trained(params))
  near(ours, out.detach().numpy())
  near(grads['w']['a'], layer.lora_A.weight.grad.numpy().T)
  near(grads['w']['b'], layer.lora_B.weight.grad.numpy().T)
  layer.merge_and_reinit()
  init = optax.adam(0.1).init
  state = {'step': 2, 'params': params, 'opt': init(weights.trained(params))}
  leaf = SPEC.restart(state, jax.random.key(0), init)['params']['w']
  near(leaf.base, layer.weight.detach().numpy().T)
  assert not leaf.b.any()
  assert not layer.lora_B.weight.any()
  for drawn in (np.asarray(leaf.a), layer.lora_A.weight.detach().numpy()):
    assert 0.8 / np.sqrt(M) < np.abs(drawn).max() <= 1 / np.sqrt(M)


def test_magnitude_pruning_is_the_official_one():
  torch = pytest.importorskip('torch')
  utils = pytest.importorskip('peft_pretraining.training_utils')
  stack = RNG.standard_normal((2, M, N)).astype('f')
  found = SPEC._pruned(jax.random.key(0), {'mu': jnp.asarray(stack)})['mu']
  for layer, moment in zip(found, stack, strict=True):
    expected = utils.magnitude_pruning(torch.tensor(moment), 0.8).numpy()
    assert 0 < (expected != 0).sum() < M * N / 4
    np.testing.assert_array_equal(layer, expected)


def test_cycles_are_the_official_ones():
  utils = pytest.importorskip('peft_pretraining.training_utils')
  lengths = dict(num_warmup_steps=10, cycle_length=100, min_lr_ratio=0.1)
  ours = schedules.cycles(1.0, steps=300, warmup_steps=10, restart_every=100, official=True)
  for count in range(300):
    expected = utils._get_cyclical_cosine_schedule_with_min_lr_lambda(count, **lengths)
    assert float(ours(count)) == pytest.approx(expected, abs=1e-6), count
