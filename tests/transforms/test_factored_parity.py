"""Our factored optimizers beside the official PyTorch ones, on the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memjax import compat

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures('svd_with_signs')]

STEPS = 24
SHAPES = pytest.mark.parametrize(
  'shape', [(12, 20), (20, 12), (16, 16)], ids=['wide', 'tall', 'square']
)


@pytest.fixture
def torch(torch, monkeypatch):
  """PyTorch on the CPU."""
  monkeypatch.setattr(torch.Tensor, 'cuda', lambda self: self)
  return torch


def _first(shape):
  return (0.05 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)


def _gradients(shape):
  """Drifting gradients whose singular values are far apart; the eighth is a thousand times larger,
  so that updates are clipped.
  """
  rng = np.random.default_rng(0)
  rank = min(shape)
  left = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
  right = np.linalg.qr(rng.standard_normal((shape[1], rank)))[0]
  for step in range(STEPS):
    left = np.linalg.qr(left + 0.1 * rng.standard_normal(left.shape))[0]
    right = np.linalg.qr(right + 0.1 * rng.standard_normal(right.shape))[0]
    size = 1000.0 if step == 7 else 1.0
    yield (size * (left * 0.8 ** np.arange(rank)) @ right.T).astype(np.float32)


def _worst(optimizer, steps, shape, names=('kernel', 'bias')):
  """Largest difference of any weight in any update, relative to the largest weight there.

  Args:
    optimizer: Ours.
    steps: Generator of the official weight [out, in] and bias after each update.
    shape: Of the weight.
    names: Of the two leaves.
  """
  weight, bias = names
  params = {weight: jnp.asarray(_first(shape).T), bias: jnp.asarray(_first(shape)[0])}
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  worst = 0.0
  for gradient, (official, official_bias) in zip(_gradients(shape), steps, strict=True):
    updates = {weight: jnp.asarray(gradient.T), bias: jnp.asarray(gradient[0])}
    updates, state = update(updates, state, params)
    params = optax.apply_updates(params, updates)
    for ours, theirs in ((params[weight].T, official), (params[bias], official_bias)):
      worst = max(worst, np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))
  # A warm-up from 1e-6 moves little, and 0.25 of it less.
  assert np.abs(np.asarray(params[weight]) - _first(shape).T).max() > 5e-6
  print(f'largest difference {worst:.1e}')
  return worst


def _stepped(torch, shape, make):
  """Weights after each `step()` of an official optimizer made of (weight, bias)."""
  weight = torch.nn.Parameter(torch.tensor(_first(shape)))
  bias = torch.nn.Parameter(torch.tensor(_first(shape)[0]))
  optimizer = make(weight, bias)
  for gradient in _gradients(shape):
    weight.grad, bias.grad = torch.tensor(gradient), torch.tensor(gradient[0])
    optimizer.step()
    yield weight.detach().numpy().copy(), bias.detach().numpy().copy()


def _fused(torch, shape, kind, lr, two_passes=False, **settings):
  """Weights after each `fused_backward` of lomo-optim, of a loss with the gradients wanted."""
  model = torch.nn.Module()
  model.weight = torch.nn.Parameter(torch.tensor(_first(shape)))
  model.bias = torch.nn.Parameter(torch.tensor(_first(shape)[0]))
  optimizer = kind(model, lr=lr, **settings)
  for gradient in _gradients(shape):
    gradient = torch.tensor(gradient)
    loss = (model.weight * gradient).sum() + (model.bias * gradient[0]).sum()
    if two_passes:
      optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, lr)
    yield model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy()


ADAFACTOR = {
  'external': {'lr': 0.01, 'relative_step': False, 'weight_decay': 0.1},
  'relative': {'weight_decay': 0.1},
  'warmup': {'warmup_init': True, 'scale_parameter': False, 'weight_decay': 0.1},
  'momentum': {'lr': 0.01, 'relative_step': False, 'beta1': 0.9, 'weight_decay': 0.1},
  'as_in_galore': {'lr': 0.01, 'relative_step': False, 'scale_parameter': False},
}


@SHAPES
@pytest.mark.parametrize('settings', ADAFACTOR.values(), ids=ADAFACTOR)
def test_adafactor_follows_transformers(torch, shape, settings):
  transformers = pytest.importorskip('transformers')
  make = lambda *leaves: transformers.Adafactor(leaves, **settings)
  assert _worst(compat.adafactor(**settings), _stepped(torch, shape, make), shape) < 1e-6


@SHAPES
@pytest.mark.parametrize('proj_type', ['std', 'reverse_std'])
@pytest.mark.parametrize('settings', ADAFACTOR.values(), ids=ADAFACTOR)
def test_galore_adafactor_follows_galore_torch(torch, shape, settings, proj_type):
  from galore_torch import GaLoreAdafactor

  group = {'rank': 4, 'update_proj_gap': 5, 'scale': 0.25, 'proj_type': proj_type}
  make = lambda weight, bias: GaLoreAdafactor(
    [{'params': [bias]}, {'params': [weight], **group}], **settings
  )
  ours = compat.galore_adafactor(**settings, **group)
  assert _worst(ours, _stepped(torch, shape, make), shape) < 1e-6


@SHAPES
@pytest.mark.parametrize(
  'settings',
  [{'weight_decay': 0.1}, {'betas': (0.9, 0.95, 0.995), 'clip_threshold': 0.5}],
  ids=['decay', 'short'],
)
def test_came_follows_came_pytorch(torch, shape, settings):
  CAME = pytest.importorskip('came_pytorch').CAME
  settings = {'lr': 1e-3, **settings}
  make = lambda *leaves: CAME(leaves, **settings)
  # Confidence divides by (u - m)^2, whose relative rounding error is that of the difference.
  assert _worst(compat.came(**settings), _stepped(torch, shape, make), shape) < 5e-6


CLIPPING = {
  'plain': {},
  'value': {'clip_grad_value': 0.05},
  'norm': {'clip_grad_norm': 0.5},
  'both': {'clip_grad_norm': 0.5, 'clip_grad_value': 0.05},
}


@SHAPES
@pytest.mark.parametrize('settings', CLIPPING.values(), ids=CLIPPING)
def test_lomo_and_adalomo_follow_lomo_optim(torch, shape, settings):
  lomo_optim = pytest.importorskip('lomo_optim')
  for official, ours in ((lomo_optim.Lomo, compat.lomo), (lomo_optim.AdaLomo, compat.adalomo)):
    arguments = {'lr': 0.01, 'weight_decay': 0.1, **settings}
    steps = _fused(torch, shape, official, two_passes='clip_grad_norm' in settings, **arguments)
    assert _worst(ours(**arguments), steps, shape) < 1e-6


@SHAPES
@pytest.mark.parametrize(
  'names',
  [
    ('attn.q_proj', 'attn_bias'),
    ('mlp.up', 'mlp.norm'),
    ('embed.tokens', 'final_norm'),
    ('lm_head', 'bias'),
    ('unknown', 'other'),
  ],
  ids=['query', 'mlp', 'embedding', 'head', 'unknown'],
)
def test_adam_mini_follows_adam_mini(torch, shape, names):
  Adam_mini = pytest.importorskip('adam_mini').Adam_mini
  columns = shape[1]
  # A head is two rows of the official weight: dim * dim / n_heads = 2 columns.
  sizes = {'dim': columns, 'n_heads': columns // 2}
  settings = {'lr': 0.01, 'weight_decay': 0.1, 'betas': (0.9, 0.95), **sizes}
  embedding = 'embed' in names[0]
  # The package takes a norm of the MLP for a matrix and fails; a norm of the layer is as good.
  official = (names[0], names[1].replace('mlp.', ''))
  make = lambda *leaves: Adam_mini(list(zip(official, leaves)), verbose=False, **settings)
  ours = compat.adam_mini(**settings)
  if embedding:
    ours = _transposed(ours, names[0])
  assert _worst(ours, _stepped(torch, shape, make), shape, names) < 1e-6


def _transposed(optimizer, name):
  """The optimizer on one leaf's transpose: a Flax embedding is as PyTorch's."""
  flip = lambda tree: {key: x.T if key == name else x for key, x in tree.items()}

  def update(updates, state, params):
    updates, state = optimizer.update(flip(updates), state, flip(params))
    return flip(updates), state

  return optax.GradientTransformation(lambda params: optimizer.init(flip(params)), update)
