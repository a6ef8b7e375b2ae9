"""`compat`'s APOLLO, Fira and Q-GaLore beside the official optimizers, on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import compat

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('svd_with_signs')]

STEPS = 24
SHAPES = {'wide': (12, 20), 'tall': (20, 12), 'square': (16, 16)}


def _gradients(shape, turn=0.1):
  """Drifting gradients whose singular values are far apart, so that no basis is degenerate."""
  rng = np.random.default_rng(0)
  rank = min(shape)
  left = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
  right = np.linalg.qr(rng.standard_normal((shape[1], rank)))[0]
  for step in range(STEPS):
    left = np.linalg.qr(left + turn * rng.standard_normal(left.shape))[0]
    right = np.linalg.qr(right + turn * rng.standard_normal(right.shape))[0]
    # Norms that jump, so that the limit on their growth has work to do.
    size = (1.0, 3.0, 0.5)[step % 3]
    yield (size * (left * 0.7 ** np.arange(rank)) @ right.T).astype(np.float32)


def _first(shape):
  return (0.02 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)


class Official:
  """Runs an official optimizer over a weight in the low-rank group and a bias beside it."""

  def __init__(self, torch, make, shape, group):
    self.torch = torch
    self.weight = torch.nn.Parameter(torch.tensor(_first(shape)))
    self.bias = torch.nn.Parameter(torch.tensor(_first(shape)[0]))
    self.optimizer = make([{'params': [self.bias]}, {'params': [self.weight], **group}])

  def step(self, gradient):
    self.weight.grad = self.torch.tensor(gradient)
    self.bias.grad = self.torch.tensor(gradient[0])
    self.optimizer.step()
    return self.weight.detach().numpy().copy(), self.bias.detach().numpy().copy()

  def projector(self):
    return self.optimizer.state[self.weight]['projector']


def _worst_difference(optimizer, gradients, expected, shape):
  params = {'kernel': jnp.asarray(_first(shape).T), 'bias': jnp.asarray(_first(shape)[0])}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  worst = 0.0
  for gradient, (weight, bias) in zip(gradients, expected, strict=True):
    updates = {'kernel': jnp.asarray(gradient.T), 'bias': jnp.asarray(gradient[0])}
    updates, state = update(updates, state, params)
    params = optax.apply_updates(params, updates)
    differences = params['kernel'].T - weight, params['bias'] - bias
    worst = max(worst, *(np.abs(d).max() for d in differences))
  print(f'largest difference {worst:.1e}')
  return worst


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
  ('group', 'settings'),
  [
    ({'rank': 4, 'scale_type': 'channel', 'scale': 1.0}, {'weight_decay': 0.1}),
    ({'rank': 1, 'scale_type': 'tensor', 'scale': 16.0}, {'weight_decay': 0.1}),
    ({'rank': 4, 'scale_type': 'channel', 'scale': 4.0}, {'scale_front': True}),
    ({'rank': 4, 'scale_type': 'tensor', 'scale': 1.0}, {'disable_nl': True}),
    ({'rank': 4, 'scale_type': 'channel', 'scale': 1.0}, {'correct_bias': False}),
    ({'rank': 4, 'scale_type': 'channel', 'scale': 1.0, 'proj': 'svd'}, {'weight_decay': 0.1}),
  ],
  ids=['channel', 'mini', 'scale_front', 'no_limit', 'no_bias_correction', 'svd'],
)
def test_apollo_adamw_follows_the_official_optimizer(torch, shape, group, settings):
  from apollo_torch import APOLLOAdamW

  gap = 5
  group = {'proj': 'random', 'proj_type': 'std', 'update_proj_gap': gap, **group}
  settings = {'lr': 0.01, **settings}
  gradients = list(_gradients(shape))
  official = Official(torch, lambda groups: APOLLOAdamW(groups, **settings), shape, group)
  expected, projections = [], []
  for step, gradient in enumerate(gradients):
    expected.append(official.step(gradient))
    if step % gap == 0:
      projections.append(official.projector().ortho_matrix.numpy().copy())
  table = jnp.asarray(np.stack(projections))
  assert len(np.unique(table[:, 0, 0])) == len(projections) > 1

  def projection_fn(path, shape, refresh):
    assert (path, shape) == ('kernel', table.shape[1:])
    return table[refresh]

  optimizer = compat.apollo_adamw(
    targets='kernel', projection_fn=projection_fn, **settings, **group
  )
  # Weights are about 0.02 and move by 0.25: f32 rounding over 24 steps, and 1e-8 in denominators.
  assert _worst_difference(optimizer, gradients, expected, shape) < 1e-6


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
  ('rank', 'alpha', 'proj_type', 'settings'),
  [
    (4, 0.25, 'std', {'weight_decay': 0.1}),
    (4, 1.0, 'std', {}),
    (2, 0.25, 'reverse_std', {'weight_decay': 0.1, 'betas': (0.8, 0.95), 'eps': 1e-4}),
    (4, 0.25, 'left', {'correct_bias': False}),
    (4, 0.25, 'right', {}),
  ],
  ids=['decay', 'no_leak', 'reverse', 'left', 'right'],
)
def test_fira_adamw_follows_the_official_optimizer(torch, shape, rank, alpha, proj_type, settings):
  from fira import FiraAdamW

  group = {'rank': rank, 'update_proj_gap': 5, 'alpha': alpha, 'proj_type': proj_type}
  settings = {'lr': 0.01, **settings}
  make = lambda groups: FiraAdamW(groups, no_deprecation_warning=True, **settings)
  official = Official(torch, make, shape, group)
  gradients = list(_gradients(shape))
  optimizer = compat.fira_adamw(targets='kernel', **settings, **group)
  expected = list(map(official.step, gradients))
  assert _worst_difference(optimizer, gradients, expected, shape) < 1e-6


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
  ('quantised', 'settings'),
  [
    ({'quant': False}, {'weight_decay': 0.1}),
    ({'quant': True, 'quant_group_size': -1, 'quant_n_bit': 8}, {'betas': (0.9, 0.95)}),
    ({'quant': True, 'quant_group_size': 16, 'quant_n_bit': 4}, {'weight_decay': 0.1}),
  ],
  ids=['f32', 'rows_8bit', 'groups_4bit'],
)
def test_q_galore_adamw8bit_follows_the_official_optimizer(
  torch, bitsandbytes_049, shape, quantised, settings
):
  from q_galore_torch import QGaLoreAdamW8bit

  # Moments of fewer than 4096 numbers are f32 in the package, too.
  group = {'rank': 4, 'update_proj_gap': 2, 'scale': 0.25}
  group |= {'cos_threshold': 0.4, 'gamma_proj': 2, 'queue_size': 3}
  official_group = {'quant': False, 'quant_group_size': -1, 'quant_n_bit': 8, **group, **quantised}
  settings = {'lr': 0.01, **settings}
  make = lambda groups: QGaLoreAdamW8bit(groups, **settings)
  official = Official(torch, make, shape, {**official_group, 'proj_type': 'std'})
  gradients = list(_gradients(shape, turn=0.02))
  expected = list(map(official.step, gradients))
  # Bases were found more than once, and more and more rarely.
  assert 3 < official.projector().svd_count < STEPS // 2
  optimizer = compat.q_galore_adamw8bit(targets='kernel', **settings, **group, **quantised)
  assert _worst_difference(optimizer, gradients, expected, shape) < 1e-6
