"""Bases against NumPy's SVD in f64, on well and badly conditioned matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.transforms import bases

SHAPE, RANK = (48, 80), 12


def _spectrum(values, shape=SHAPE):
  rng = np.random.default_rng(0)
  side = min(shape)
  left = np.linalg.qr(rng.standard_normal((shape[0], side)))[0]
  right = np.linalg.qr(rng.standard_normal((shape[1], side)))[0]
  return (left * values) @ right.T


def _with_zero_rows():
  matrix = np.random.default_rng(1).standard_normal(SHAPE)
  matrix[RANK // 2 :] = 0
  return matrix


def _corner():
  matrix = np.zeros(SHAPE)
  matrix[-1, -1] = 1
  return matrix


HARD = {
  'gaussian': lambda: np.random.default_rng(2).standard_normal(SHAPE),
  'ratio_1e6': lambda: _spectrum(np.logspace(0, -6, 48)),
  'ratio_1e6_within_rank': lambda: _spectrum(np.append(np.logspace(0, -6, RANK), np.zeros(36))),
  'rank_below_r': lambda: _spectrum(np.append(np.ones(5), np.zeros(43))),
  'fewer_tokens_than_r': lambda: (
    np.random.default_rng(3).standard_normal((48, 3))
    @ np.random.default_rng(4).standard_normal((3, 80))
  ),
  'zero_rows': _with_zero_rows,
  'single_entry': _corner,
  'all_equal': lambda: np.ones(SHAPE),
  'identity': lambda: np.eye(*SHAPE),
  'tiny': lambda: 1e-30 * np.random.default_rng(5).standard_normal(SHAPE),
  'huge': lambda: 1e30 * np.random.default_rng(6).standard_normal(SHAPE),
}


def _captured(basis, matrix):
  """Energy of `matrix` in the basis, relative to the best basis of that rank."""
  matrix = matrix / np.abs(matrix).max()
  best = np.sum(np.linalg.svd(matrix, compute_uv=False)[: basis.shape[1]] ** 2)
  return np.sum((np.asarray(basis, np.float64).T @ matrix) ** 2) / best


def _orthonormality_error(basis):
  basis = np.asarray(basis, np.float64)
  return np.abs(basis.T @ basis - np.eye(basis.shape[1])).max()


@pytest.fixture(scope='module')
def refresh():
  return jax.jit(bases.subspace_iteration().refresh)


@pytest.mark.parametrize('name', HARD)
def test_bases_are_orthonormal_in_f32_for_any_gradient(refresh, name):
  matrix = HARD[name]()
  gradient = jnp.asarray(matrix, jnp.float32)
  basis = jnp.eye(SHAPE[0], RANK)
  for step in range(3):
    basis = refresh(gradient, basis, jax.random.key(step))
    # About 8 units of rounding in a sum of 48. Equal entries add up their rounding errors, which
    # takes a larger shift in the factorisation and leaves its square.
    assert _orthonormality_error(basis) < (2e-5 if name == 'all_equal' else 1e-6)
  # A flat spectrum has no gap at r for the iteration to find; 5 % is what chance leaves.
  flat = name in ('gaussian', 'tiny', 'huge')
  assert _captured(basis, matrix) > (0.95 if flat else 0.999)


def test_warm_start_follows_a_drifting_gradient(refresh):
  rng = np.random.default_rng(0)
  left = np.linalg.qr(rng.standard_normal((48, 48)))[0]
  right = np.linalg.qr(rng.standard_normal((80, 48)))[0]
  basis = jnp.eye(48, RANK)
  for step in range(12):
    left = np.linalg.qr(left + 0.02 * rng.standard_normal(left.shape))[0]
    matrix = (left * 0.8 ** np.arange(48)) @ right.T
    basis = refresh(jnp.asarray(matrix, jnp.float32), basis, jax.random.key(step))
    assert _captured(basis, matrix) > 0.999
  # Without the warm start: the first basis no longer captures what the gradient has become.
  first = refresh(
    jnp.asarray(HARD['gaussian'](), jnp.float32), jnp.eye(48, RANK), jax.random.key(0)
  )
  assert _captured(first, matrix) < 0.9


def test_svd_gives_the_leading_vectors_with_fixed_signs():
  matrix = _spectrum(0.8 ** np.arange(48))
  basis = bases.svd().refresh(jnp.asarray(matrix, jnp.float32), jnp.eye(48, RANK), None)
  vectors = np.linalg.svd(matrix)[0][:, :RANK]
  vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(RANK)])
  # A vector is resolved to the rounding error over its spectral gap, 1e-7 / (0.2 * 0.8**11).
  np.testing.assert_allclose(basis, vectors, atol=2e-5)


@pytest.mark.parametrize('singular_values', ['equal', 'eight_decades', 'one'])
def test_columns_become_orthonormal_however_dependent(singular_values):
  """After two passes alone the last two cases would be off by 0.5 and more."""
  rng = np.random.default_rng(0)
  orthonormal = lambda m, r: np.linalg.qr(rng.standard_normal((m, r)))[0]
  tall = {
    'equal': lambda: orthonormal(512, 128),
    'eight_decades': lambda: (
      (orthonormal(512, 128) * np.logspace(0, -8, 128)) @ orthonormal(128, 128)
    ),
    'one': lambda: np.ones((512, 128)),
  }[singular_values]()
  fill = jnp.asarray(orthonormal(512, 128), jnp.float32)
  q = np.asarray(jax.jit(bases.orthonormalise)(jnp.asarray(tall, jnp.float32), fill), np.float64)
  # A Gram matrix of 128 columns in f32.
  np.testing.assert_allclose(q.T @ q, np.eye(128), atol=1e-5)


@pytest.mark.parametrize('basis', [bases.subspace_iteration(), bases.svd()], ids=['iterate', 'svd'])
def test_zero_gradient_keeps_the_basis(basis):
  previous = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((6, 2)))[0])
  kept = basis.refresh(jnp.zeros((6, 9)), previous, jax.random.key(0))
  np.testing.assert_array_equal(kept, previous)


def test_nothing_larger_than_r_by_r_is_factorised():
  traced = str(
    jax.make_jaxpr(bases.subspace_iteration().refresh)(
      jnp.zeros(SHAPE), jnp.zeros((48, RANK)), jax.random.key(0)
    )
  )
  factorised = [line for line in traced.splitlines() if 'cholesky' in line or 'triangular' in line]
  assert factorised
  assert all(f'f32[{RANK},{RANK}]' in line for line in factorised if 'f32[' in line)
  assert 'householder' not in traced
  assert 'geqrf' not in traced


def test_no_iterations_are_refused():
  with pytest.raises(ValueError, match='at least one iteration'):
    bases.subspace_iteration(iterations=0)
