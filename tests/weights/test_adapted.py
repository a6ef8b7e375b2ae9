"""`W + s A B` as a leaf: its products are those of the array that it stands for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import weights

SCALE = 0.5


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


X, W, A, B = draw(2, 5, 8), draw(8, 6), draw(8, 3, seed=1), draw(3, 6, seed=2)


def make(base=W, **fields):
  return weights.Adapted(base, A, B, scale=SCALE, **fields)


def test_products_and_rows_are_those_of_the_sum():
  leaf, whole = make(), W + SCALE * A @ B
  np.testing.assert_allclose(leaf.materialize(), whole, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(leaf.dot(X), X @ whole, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(leaf.dot(X[..., :6], True), X[..., :6] @ whole.T, rtol=1e-5, atol=1e-5)
  ids = jnp.array([[7, 0], [3, 3]])
  np.testing.assert_allclose(leaf.take(ids), whole[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('transpose', [False, True])
@pytest.mark.parametrize('base', [W, weights.quantise(W)], ids=['array', 'int8'])
def test_gradients_are_those_of_the_sum_with_a_frozen_base(base, transpose):
  x = X[..., :6] if transpose else X
  fixed = weights.materialize(base)

  def expected(x, a, b):
    whole = fixed + SCALE * a @ b
    return jnp.sum(jnp.sin(x @ (whole.T if transpose else whole)))

  def of_leaf(x, a, b):
    leaf = dataclasses.replace(make(base), a=a, b=b)
    return jnp.sum(jnp.sin(weights.dot(x, leaf, transpose)))

  want = jax.grad(expected, (0, 1, 2))(x, A, B)
  for got, right in zip(jax.grad(of_leaf, (0, 1, 2))(x, A, B), want, strict=True):
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)
  assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(lambda w: make(w).dot(X).sum())(W)))


def kept(function, *args):
  """Shapes of what differentiation keeps beside the arguments."""
  _, pull_back = jax.vjp(function, *args)
  given = {id(x) for x in jax.tree.leaves(args)}
  return sorted(x.shape for x in jax.tree.leaves(pull_back) if id(x) not in given)


def test_the_backward_pass_keeps_the_activations_or_with_a_fixed_factor_their_projection():
  base = weights.quantise(W)

  def trained(x, a, b):
    return dataclasses.replace(make(base), a=a, b=b).dot(jnp.sin(x))

  # `sin` keeps its derivative, of the same shape; besides, the codes and scales as they are.
  stored = [x.shape for x in jax.tree.leaves(base)]
  assert kept(trained, X, A, B) == sorted([X.shape, X.shape, *stored])

  def dropped(x, a, b):
    key = jax.random.key_data(jax.random.key(1))
    return dataclasses.replace(make(base, dropout=0.4), a=a, b=b, key=key).dot(jnp.sin(x))

  # The mask is drawn again, from its key.
  assert kept(dropped, X, A, B) == sorted([X.shape, X.shape, *stored, (2,)])

  fixed = weights.Drawn(jax.random.key_data(jax.random.key(0)), (8, 3), 1.0)

  def projected(x, b):
    return dataclasses.replace(make(base), a=fixed, b=b).dot(jnp.sin(x))

  assert kept(projected, X, B) == sorted([X.shape, (2, 5, 3), *stored, (2,)])


def test_dropout_keeps_the_mean_and_is_the_same_for_the_same_key():
  key = lambda i: jax.random.key_data(jax.random.key(i))
  leaf = make(dropout=0.4)
  seen = lambda i: dataclasses.replace(leaf, key=key(i)).dot(X)
  np.testing.assert_array_equal(seen(1), seen(1))
  assert np.abs(seen(1) - seen(2)).max() > 0.1
  np.testing.assert_allclose(leaf.dot(X), make().dot(X))  # Without a key nothing is dropped.
  many = jax.vmap(lambda i: seen(i))(jnp.arange(4096))
  # Of each of the 60 numbers: within five standard errors.
  error = many.std(axis=0) / np.sqrt(4096)
  np.testing.assert_array_less(np.abs(many.mean(axis=0) - make().dot(X)), 5 * error)
  # What the base multiplies is not dropped: with factors of zero there is no noise.
  still = dataclasses.replace(leaf, b=jnp.zeros_like(B), key=key(1))
  np.testing.assert_allclose(still.dot(X), X @ W, rtol=1e-5, atol=1e-5)


def test_in_16_bits_small_additions_are_not_rounded_away_however_many_rows():
  signs = jnp.tile(jnp.array([1.0, -1.0], jnp.bfloat16), 16)
  leaf = weights.Adapted(
    jnp.ones((32, 32), jnp.bfloat16), 2e-4 * signs[:, None], jnp.ones((1, 32), jnp.bfloat16)
  )
  x = jnp.tile(signs, (64, 1))
  np.testing.assert_allclose(jax.jit(weights.dot)(x, leaf), 32 * 2e-4, rtol=0.02)


def test_gradients_of_factors_in_16_bits_are_summed_in_16_bits_as_those_of_matrices_are():
  """What devices send each other of factors in bf16 is bf16; of factors in f32, f32."""
  half = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))

  def dtypes(leaf):
    use = lambda a, b: dataclasses.replace(leaf, a=a, b=b).dot(half(X)).sum()
    equations = jax.make_jaxpr(jax.grad(use, (0, 1)))(leaf.a, leaf.b).eqns
    made = [eqn.outvars[0].aval for eqn in equations if eqn.primitive.name == 'dot_general']
    return {x.dtype for x in made if x.shape in (A.shape, B.shape)}

  assert dtypes(half(make())) == {jnp.dtype('bfloat16')}
  assert dtypes(make(half(W))) == {jnp.dtype('float32')}


def test_micro_batches_drop_other_activations():
  key = jax.random.key_data(jax.random.split(jax.random.key(1), 2))
  stack = jax.tree.map(lambda x: jnp.stack([x] * 2), {'w': make(), 'norm': jnp.ones(3)})
  stack['w'] = dataclasses.replace(stack['w'], key=key, dropout=0.4)
  seen = lambda index: jax.vmap(lambda leaf: leaf.dot(X))(weights.in_part(stack, index)['w'])
  assert np.abs(seen(0) - seen(1)).max() > 0.1
  one = jax.tree.map(lambda x: x[1], stack)
  np.testing.assert_array_equal(weights.in_part(one, 1)['w'].dot(X), seen(1)[1])


def test_trained_and_replaced_are_opposites_and_leave_out_what_is_frozen():
  params = {'a': make(), 'b': [weights.Frozen(W), W], 'c': weights.quantise(W)}
  found = weights.trained(params)
  assert found['b'][0] is None
  assert found['b'][1] is W
  assert found['c'] is params['c']
  assert set(found['a']) == {'a', 'b'}
  doubled = jax.tree.map(lambda x: 2 * x, {**found, 'c': W})
  new = weights.replaced(params, doubled)
  np.testing.assert_array_equal(new['a'].a, 2 * A)
  assert new['a'].base is W
  assert new['b'][0].value is W
  np.testing.assert_array_equal(new['c'], 2 * W)


def test_a_frozen_weight_has_no_gradient_and_keeps_nothing_of_its_own():
  for value in (W, weights.quantise(W)):
    leaf = weights.Frozen(value)
    of_x = jax.grad(lambda x, leaf=leaf: jnp.sum(jnp.sin(leaf.dot(x))))(X)
    whole = weights.materialize(value)
    np.testing.assert_allclose(of_x, jnp.cos(X @ whole) @ whole.T, rtol=1e-4, atol=1e-5)
    # Of activations, the cosine of `sin` alone; and derivatives may go forward.
    stored = [x.shape for x in jax.tree.leaves(value)] if weights.is_weight(value) else []
    shapes = kept(lambda x, leaf=leaf: leaf.dot(jnp.sin(x)), X)
    assert [s for s in shapes if s not in stored] == [X.shape] + [W.shape] * (not stored)
    _, along = jax.jvp(leaf.dot, (X,), (X,))
    np.testing.assert_allclose(along, X @ whole, rtol=1e-4, atol=1e-5)
  assert not np.any(jax.grad(lambda w: weights.Frozen(w).dot(X).sum())(W))
  assert not np.any(jax.grad(lambda w: weights.Frozen(w).materialize().sum())(W))


def test_a_drawn_matrix_has_its_moments_and_is_drawn_again():
  leaf = weights.Drawn(jax.random.key_data(jax.random.key(3)), (512, 64), 0.25)
  drawn = leaf.materialize()
  np.testing.assert_array_equal(drawn, leaf.materialize())
  assert abs(float(drawn.std()) - 0.25) < 5 * 0.25 / np.sqrt(2 * drawn.size)
  assert abs(float(drawn.mean())) < 5 * 0.25 / np.sqrt(drawn.size)
  x = draw(4, 512)
  np.testing.assert_allclose(leaf.dot(x), x @ drawn, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(leaf.dot(x[:, :64], True), x[:, :64] @ drawn.T, rtol=1e-4, atol=1e-4)
