"""What is adapted and what is frozen, and the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import adapters, weights
from tests.models import tiny

MODEL = tiny.make(layers=2)
PARAMS = tiny.random_params(MODEL)
KEY = jax.random.key(0)
TOKENS = jnp.arange(12).reshape(2, 6)


def logits(params):
  return MODEL.logits(params, TOKENS)


@pytest.mark.parametrize('store', [lambda x: x, weights.quantise], ids=['dense', 'int8'])
def test_a_model_with_adapters_is_at_first_the_same_function(store):
  blocks = jax.tree.map(lambda x: store(x) if x.ndim == 3 else x, PARAMS['blocks'])
  params = {**PARAMS, 'blocks': blocks}
  adapted = adapters.attach(params, adapters.LoRA(rank=4, alpha=8), KEY)
  np.testing.assert_allclose(logits(adapted), logits(params), rtol=1e-5, atol=1e-5)
  trained = adapters.trainable(adapted)
  shapes = {jnp.shape(x)[-1 if k == 'a' else -2] for k, x in factors(trained)}
  assert shapes == {4}
  assert trained['embed']['embedding'] is None
  assert jax.tree.structure(adapters.detach(adapted)) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, adapters.detach(adapted), params)


def test_a_pattern_passes_over_vectors():
  adapted = adapters.attach(PARAMS, adapters.LoRA(rank=2, targets='attn'), KEY)
  assert isinstance(adapted['blocks']['attn_norm']['scale'], weights.Frozen)
  assert isinstance(adapted['blocks']['attn']['q']['kernel'], weights.Adapted)
  plain = {'dense': {'w': jnp.ones((4, 4)), 'b': jnp.ones(4)}}
  dense = adapters.attach(plain, adapters.LoRA(rank=2, targets='dense'), KEY)['dense']
  assert isinstance(dense['b'], weights.Frozen)
  assert isinstance(dense['w'], weights.Adapted)


def factors(trained):
  leaves = jax.tree.leaves_with_path(trained)
  return [(path[-1].key, leaf) for path, leaf in leaves]


def test_factors_are_drawn_as_published_and_apart():
  wide = {'w': jnp.zeros((2, 1024, 64)), 'v': jnp.zeros((2, 1024, 64))}
  draw = lambda **fields: adapters.attach(wide, adapters.LoRA(rank=16, **fields), KEY)
  kaiming, gaussian = draw()['w'].a, draw(init='gaussian')['w'].a
  bound = 1 / np.sqrt(1024)
  assert float(jnp.abs(kaiming).max()) <= bound
  assert abs(float(kaiming.std()) - bound / np.sqrt(3)) < 0.01 * bound
  assert abs(float(gaussian.std()) - 1 / 16) < 0.01 / 16
  assert not np.array_equal(kaiming[0], kaiming[1])
  assert not np.array_equal(kaiming, draw()['v'].a)
  np.testing.assert_array_equal(kaiming, draw()['w'].a)


@pytest.mark.parametrize(
  ('fields', 'scale'),
  [(dict(), 1.0), (dict(alpha=32), 8.0), (dict(alpha=32, rank_stabilized=True), 16.0)],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(fields, scale):
  assert adapters.LoRA(rank=4, **fields).scale == scale


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_merged_model_is_the_adapted_one(dtype):
  params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
  adapted = adapters.attach(params, adapters.LoRA(rank=4, dtype='float32'), KEY)
  moved = jax.tree.map(lambda x: x + 0.1, adapters.trainable(adapted))
  adapted = adapters.replaced(adapted, moved)
  merged = jax.jit(adapters.merge)(adapted)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  kernel = adapted['blocks']['attn']['q']['kernel']
  expected = kernel.base.astype(jnp.float32) + jnp.einsum('lmr,lrn->lmn', kernel.a, kernel.b)
  got = merged['blocks']['attn']['q']['kernel']
  np.testing.assert_array_equal(got, expected.astype(dtype))
  np.testing.assert_array_equal(merged['embed']['embedding'], params['embed']['embedding'])
  if dtype == 'float32':
    np.testing.assert_allclose(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


def test_a_bf16_merge_with_a_key_keeps_small_additions_on_average():
  base = jnp.ones((4, 64, 64), jnp.bfloat16)
  a, b = jnp.full((4, 64, 1), 0.001, jnp.float32), jnp.ones((4, 1, 64), jnp.float32)
  leaf = {'w': weights.Adapted(base, a, b)}
  assert float(jnp.mean(adapters.merge(leaf)['w'], dtype=jnp.float32)) == 1
  mean = float(jnp.mean(adapters.merge(leaf, jax.random.key(1))['w'], dtype=jnp.float32))
  # A quarter of 16,384 weights move by 2**-7: five standard errors.
  assert abs(mean - 1.001) < 5 * 2**-7 * np.sqrt(0.11 / base.size)


@pytest.mark.parametrize('store', [weights.quantise, weights.quantise_nf4], ids=['int8', 'nf4'])
def test_a_merge_into_arrays_keeps_what_codes_would_round_away(store):
  params = {'w': store(jax.random.normal(KEY, (16, 128, 128))), 'v': store(jnp.ones((8, 8)))}
  adapted = adapters.attach(params, adapters.LoRA(rank=2, targets='w'), KEY)
  adapted = adapters.replaced(adapted, jax.tree.map(lambda x: x + 1e-2, weights.trained(adapted)))
  into = lambda dtype: jax.jit(lambda p: adapters.merge(p, jax.random.key(1), dtype))
  whole, half = into(jnp.float32)(adapted), into(jnp.bfloat16)(adapted)
  expected = weights.materialize(adapted['w'])
  np.testing.assert_allclose(whole['w'], expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_equal(whole['v'], np.ones((8, 8)))
  assert half['w'].dtype == jnp.bfloat16
  # Rounded stochastically, the mean is kept.
  error = np.asarray(half['w'], np.float64) - np.asarray(expected)
  assert abs(error.mean()) < 5 * error.std() / np.sqrt(error.size)
  memory = into(jnp.bfloat16).lower(adapted).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 12 * 4 * 128 * 128


def test_a_weight_that_restarts_have_changed_is_not_what_it_was():
  for spec in (adapters.ReLoRA(rank=2, every=2), adapters.RSO(rank=2)):
    adapted = jax.eval_shape(lambda spec=spec: adapters.attach({'w': jnp.ones((8, 8))}, spec, KEY))
    with pytest.raises(ValueError, match=r'^w: restarts add to the weight'):
      adapters.detach(adapted)


def test_methods_that_add_to_the_weight_refuse_one_in_codes():
  params = {'w': weights.quantise(jnp.ones((8, 8)))}
  for spec in (adapters.ReLoRA(rank=2), adapters.SwitchLoRA(rank=2), adapters.RSO(rank=2)):
    with pytest.raises(
      ValueError, match=r'^w is held as Int8, [^;]*; keep it dense, or attach LoRA'
    ):
      adapters.attach(params, spec, KEY)


def test_a_merge_is_in_place_and_holds_one_matrix():
  params = {'w': jnp.zeros((16, 128, 128))}
  adapted = adapters.attach(params, adapters.LoRA(rank=2), KEY)
  compiled = jax.jit(adapters.merge, donate_argnums=0).lower(adapted).compile()
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= params['w'].nbytes
  assert memory.temp_size_in_bytes < 3 * params['w'].nbytes / 16


@pytest.mark.parametrize(
  ('spec', 'words'),
  [
    (dict(targets='atn/q'), "'atn/q' matches no matrix"),
    (dict(rank=33), 'attn/k/kernel: rank 33 is not between 1 and 16'),
    (dict(targets='norm'), 'matches no matrix'),
    (dict(rest='nrom'), "'nrom' matches no leaf"),
  ],
)
def test_bad_specifications_name_the_leaf(spec, words):
  with pytest.raises(ValueError, match=words):
    adapters.attach(PARAMS, adapters.LoRA(**{'rank': 4, **spec}), KEY)


def test_an_adapted_tree_is_refused():
  adapted = adapters.attach(PARAMS, adapters.LoRA(rank=4), KEY)
  with pytest.raises(ValueError, match='leaf already; merge or detach'):
    adapters.attach(adapted, adapters.LoRA(rank=4), KEY)


@pytest.mark.parametrize(
  'fields', [dict(init='x'), dict(dropout=1.0), dict(form='x'), dict(form='merged', dropout=0.1)]
)
def test_bad_fields_are_refused(fields):
  with pytest.raises(ValueError, match=next(iter(fields))):
    adapters.LoRA(rank=4, **fields)
