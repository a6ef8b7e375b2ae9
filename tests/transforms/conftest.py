"""PyTorch, for the tests beside the official packages."""

import pytest


@pytest.fixture
def torch():
  return pytest.importorskip('torch')


@pytest.fixture
def svd_with_signs(torch, monkeypatch):
  """Fixes the signs of singular vectors, which LAPACK leaves open."""
  exact = torch.linalg.svd

  def signs(vectors):
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return torch.sign(torch.take_along_dim(vectors, largest, dim=0))

  def svd(matrix, full_matrices=False):
    u, s, vh = exact(matrix, full_matrices=full_matrices)
    return u * signs(u), s, vh * signs(vh.T).T

  monkeypatch.setattr(torch.linalg, 'svd', svd)


@pytest.fixture
def bitsandbytes_049(monkeypatch, torch):
  """bitsandbytes with the arguments that q-galore-torch passes by position, up to 0.49."""
  bitsandbytes = pytest.importorskip('bitsandbytes')
  optimizer, functional = bitsandbytes.optim.optimizer, bitsandbytes.functional
  init, config = optimizer.Optimizer2State.__init__, optimizer.Optimizer8bit.get_config
  update = functional.optimizer_update_32bit

  def old_init(self, name, params, *args, is_paged=False):
    *args, percentile_clipping, block_wise = args
    assert (percentile_clipping, block_wise) == (100, True)
    init(self, name, params, *args, is_paged=is_paged)

  def old_config(self, *args):
    return config(self, *args) | {'percentile_clipping': 100, 'block_wise': True}

  def old_update(name, g, p, state1, b1, eps, step, lr, state2, b2, decay, norm, unorm, **rest):
    update(name, g, p, state1, b1, eps, step, lr, state2, b2, 0.0, 0.0, decay, norm, unorm, **rest)

  monkeypatch.setattr(optimizer.Optimizer2State, '__init__', old_init)
  monkeypatch.setattr(optimizer.Optimizer8bit, 'get_config', old_config)
  blockwise = functional.optimizer_update_8bit_blockwise

  def old_blockwise(name, g, p, state1, state2, b1, b2, *rest, **named):
    blockwise(name, g, p, state1, state2, b1, b2, 0.0, 0.0, *rest, **named)

  monkeypatch.setattr(functional, 'optimizer_update_32bit', old_update)
  monkeypatch.setattr(functional, 'optimizer_update_8bit_blockwise', old_blockwise)
  monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)
