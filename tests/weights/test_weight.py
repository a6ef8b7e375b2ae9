"""A leaf that answers for itself must be, in a whole model, as good as the array it stands for."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import weights
from memjax.models import create


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
  """`w + s a b`: a toy adapter, for any leaf with two last axes; `w` may be a `Weight` itself."""

  w: Any
  a: jax.Array
  b: jax.Array
  s: float = dataclasses.field(default=0.5, metadata={'static': True})

  def dot(self, x, transpose=False):
    first, second = (self.b, self.a) if transpose else (self.a, self.b)
    low = weights.dot(weights.dot(x, first, transpose), second, transpose)
    return weights.dot(x, self.w, transpose) + self.s * low

  def take(self, ids):
    return weights.take(self.w, ids) + self.s * weights.dot(weights.take(self.a, ids), self.b)

  def materialize(self):
    return weights.materialize(self.w) + self.s * jnp.matmul(self.a, self.b)


def low_rank_params(model, rank=3, seed=0):
  """Random parameters, every matrix with a low-rank term."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32)

  def leaf(path, w):
    if path[-1].key == 'scale':
      return 1 + draw(*w.shape)
    *layers, m, n = w.shape
    return LowRank(draw(*layers, m, n), draw(*layers, m, rank), draw(*layers, rank, n))

  return jax.tree.map_with_path(leaf, model.abstract())


def materialize_all(params):
  return jax.tree.map(weights.materialize, params, is_leaf=weights.is_weight)


def batch_of(model, rows=2, length=12):
  tokens = np.random.default_rng(1).integers(0, model.vocab, (rows, length + 1), dtype=np.int32)
  tokens = jnp.asarray(tokens)
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': jnp.ones((rows, length)),
  }


@pytest.mark.parametrize('transpose', [False, True])
@pytest.mark.parametrize('nested', [False, True])
def test_leaf_agrees_with_its_array(transpose, nested):
  key = jax.random.key(0)
  w = jax.random.normal(key, (5, 4))
  leaf = LowRank(w, jnp.ones((5, 2)), jnp.full((2, 4), 0.3))
  if nested:
    leaf = LowRank(leaf, jnp.full((5, 1), -0.7), jnp.ones((1, 4)))
  x = jax.random.normal(key, (3, 4 if transpose else 5))
  dense = weights.materialize(leaf)
  np.testing.assert_allclose(
    weights.dot(x, leaf, transpose), np.asarray(x) @ (dense.T if transpose else dense), rtol=1e-5
  )
  ids = jnp.array([4, 0, 4])
  np.testing.assert_allclose(weights.take(leaf, ids), dense[ids], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('tied', [False, True])
def test_whole_model_of_leaves_equals_materialised_model(tied):
  model = create('llama_tiny', vocab=64, tied=tied)
  params, batch = low_rank_params(model), batch_of(model)
  loss = jax.jit(lambda params: model.loss(params, batch)[0])
  np.testing.assert_allclose(loss(params), loss(materialize_all(params)), rtol=2e-6)
  # The toy term must matter, or the comparison shows nothing.
  unwrap = lambda x: x.w if weights.is_weight(x) else x
  plain = jax.tree.map(unwrap, params, is_leaf=weights.is_weight)
  assert abs(loss(params) - loss(plain)) > 1e-2


def test_gradient_reaches_every_part_of_a_leaf():
  model = create('llama_tiny', vocab=64)
  params, batch = low_rank_params(model), batch_of(model)
  loss = lambda params: model.loss(params, batch)[0]
  got = jax.jit(jax.grad(loss))(params)
  dense = jax.jit(jax.grad(loss))(materialize_all(params))
  for part in ('q', 'o'):
    leaf, grad = params['blocks']['attn'][part]['kernel'], got['blocks']['attn'][part]['kernel']
    full = np.asarray(dense['blocks']['attn'][part]['kernel'], np.float64)
    # The chain rule by hand: d/dw = G, d/da = s G b^T, d/db = s a^T G.
    a, b = np.swapaxes(leaf.a, 1, 2), np.swapaxes(leaf.b, 1, 2)
    expected = (full, 0.5 * full @ b, 0.5 * a @ full)
    for mine, reference in zip((grad.w, grad.a, grad.b), expected):
      # f32 sums in another order: relative to the largest entry.
      np.testing.assert_allclose(mine, reference, atol=2e-5 * np.abs(reference).max())


def test_dot_casts_the_weight_and_keeps_gradients_in_its_dtype():
  x, w = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float32)
  assert weights.dot(x, w).dtype == jnp.bfloat16
  grad = jax.grad(lambda w: weights.dot(x, w).astype(jnp.float32).sum())(w)
  assert grad.dtype == jnp.float32


def test_shape_mismatch_names_both_shapes():
  with pytest.raises(ValueError, match=r'\(2, 5\).*\(3, 4\)'):
    weights.dot(jnp.ones((2, 5)), jnp.ones((3, 4)))
  with pytest.raises(ValueError, match=r'\(2, 3\).*\(3, 4\) transposed'):
    weights.dot(jnp.ones((2, 3)), jnp.ones((3, 4)), transpose=True)
  with pytest.raises(ValueError, match=r'lax\.scan'):
    weights.dot(jnp.ones((2, 3)), jnp.ones((6, 3, 4)))
  with pytest.raises(ValueError, match='integers'):
    weights.take(jnp.ones((3, 4)), jnp.ones((2,)))


def test_unknown_token_is_loud():
  rows = weights.take(jnp.ones((3, 4)), jnp.array([2, 3]))
  assert jnp.isfinite(rows[0]).all()
  assert jnp.isnan(rows[1]).all()


def test_is_weight_tells_leaves_from_arrays_tracers_and_classes():
  leaf = LowRank(jnp.ones((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)))
  assert weights.is_weight(leaf)
  for other in (jnp.ones((2, 2)), np.ones((2, 2)), {'kernel': leaf}, LowRank, None):
    assert not weights.is_weight(other)
  assert jax.jit(lambda x: jnp.float32(weights.is_weight(x)))(jnp.ones(2)) == 0
