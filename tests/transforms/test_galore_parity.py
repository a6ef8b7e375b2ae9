"""Our `compat.galore_adamw` beside the official PyTorch optimizer, on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import compat

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('svd_with_signs')]

STEPS = 24


def _gradients(shape):
  """Drifting gradients whose singular values are far apart, so that no basis is degenerate."""
  rng = np.random.default_rng(0)
  rank = min(shape)
  left = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
  right = np.linalg.qr(rng.standard_normal((shape[1], rank)))[0]
  for _ in range(STEPS):
    left = np.linalg.qr(left + 0.1 * rng.standard_normal(left.shape))[0]
    right = np.linalg.qr(right + 0.1 * rng.standard_normal(right.shape))[0]
    yield ((left * 0.7 ** np.arange(rank)) @ right.T).astype(np.float32)


def _official(torch, shape, gradients, settings, group):
  from galore_torch import GaLoreAdamW

  weight = torch.nn.Parameter(torch.tensor(_first(shape)))
  bias = torch.nn.Parameter(torch.tensor(_first(shape)[0]))
  groups = [{'params': [bias]}, {'params': [weight], **group}]
  optimizer = GaLoreAdamW(groups, no_deprecation_warning=True, **settings)
  for gradient in gradients:
    weight.grad = torch.tensor(gradient)
    bias.grad = torch.tensor(gradient[0])
    optimizer.step()
    yield weight.detach().numpy().copy(), bias.detach().numpy().copy()


def _first(shape):
  return (0.02 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize('proj_type', ['std', 'reverse_std', 'left', 'right', 'full'])
@pytest.mark.parametrize('shape', [(12, 20), (20, 12), (16, 16)], ids=['wide', 'tall', 'square'])
@pytest.mark.parametrize(
  ('rank', 'settings'),
  [
    (4, {}),
    (4, {'weight_decay': 0.1}),
    (1, {'weight_decay': 0.1, 'betas': (0.8, 0.95), 'eps': 1e-4}),
    (4, {'correct_bias': False}),
    (40, {'weight_decay': 0.1}),
  ],
  ids=['plain', 'decay', 'rank1', 'no_bias_correction', 'rank_above_min'],
)
def test_weights_follow_the_official_optimizer(torch, shape, rank, settings, proj_type):
  if proj_type == 'reverse_std' and shape[0] < shape[1] and rank >= shape[0]:
    pytest.skip('the official projector multiplies ill-shaped matrices here')
  gradients = list(_gradients(shape))
  group = {'rank': rank, 'update_proj_gap': 5, 'scale': 0.25, 'proj_type': proj_type}
  settings = {'lr': 0.01, **settings}
  if proj_type == 'full':
    # The projected gradient is diagonal at each refresh: off the diagonal Adam divides one rounding
    # error by another, which a larger eps hides.
    settings = {'eps': 1e-4, **settings}
  optimizer = compat.galore_adamw(targets='kernel', **settings, **group)
  params = {'kernel': jnp.asarray(_first(shape).T), 'bias': jnp.asarray(_first(shape)[0])}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  worst = 0.0
  for gradient, (weight, bias) in zip(
    gradients, _official(torch, shape, gradients, settings, group)
  ):
    updates = {'kernel': jnp.asarray(gradient.T), 'bias': jnp.asarray(gradient[0])}
    updates, state = update(updates, state, params)
    params = optax.apply_updates(params, updates)
    worst = max(
      worst,
      np.abs(params['kernel'].T - weight).max(),
      np.abs(params['bias'] - bias).max(),
    )
  print(f'largest difference {worst:.1e}')
  # Weights are about 0.02 and move by 0.25: f32 rounding over 24 steps, twice 5 bases apart.
  assert worst < 1e-6
