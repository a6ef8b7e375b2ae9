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
