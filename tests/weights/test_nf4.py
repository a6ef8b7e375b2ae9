"""4-bit weights: the published levels, codes against numpy and the official package, and a loop
over layers that holds one matrix at a time.
"""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from memjax import adapters, sharding, weights
from memjax.weights import nf4
from memjax.weights.frozen import frozen_dot
from tests import hlo


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# One program each, where eager calls would compile every operation.
quantise = jax.jit(weights.quantise_nf4, static_argnames='double')
dense = jax.jit(weights.materialize)
take = jax.jit(weights.take)
add = jax.jit(lambda w, update, key=None: w.add(update, key))


def test_levels_are_the_quantiles_of_the_paper():
  """QLoRA, equation 4 and appendix E: 8 quantiles above zero, 7 below, over the largest."""
  quantile, offset = statistics.NormalDist().inv_cdf, 0.9677083
  above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  levels = np.sort([*below, 0.0, *above]) / max(above)
  np.testing.assert_allclose(nf4.LEVELS, levels, atol=1e-6)


def nearest(x, block):
  """By numpy: the scales, and the number that each of x becomes."""
  *batch, m, n = x.shape
  cut = x.reshape(*batch, m // block, block, n)
  scales = np.abs(cut).max(-2)
  share = (cut / scales[..., None, :])[..., None]
  found = nf4.LEVELS[np.abs(share - nf4.LEVELS).argmin(-1)]
  return scales, (found * scales[..., None, :]).reshape(x.shape)


@pytest.mark.parametrize('shape', [(256, 3), (2, 86, 5), (2, 3, 64, 4)])
def test_numbers_become_the_nearest_levels(shape):
  x = np.asarray(draw(*shape))
  block = {256: 64, 86: 43, 64: 64}[shape[-2]]
  w = quantise(x, double=False)
  scales, expected = nearest(x, block)
  np.testing.assert_array_equal(w.scales, scales)
  np.testing.assert_allclose(dense(w), expected, rtol=1e-6)
  assert w.codes.shape == (*shape[:-2], shape[-2] // block * -(-block // 2), shape[-1])


def test_scales_in_8_bits_take_half_a_byte_and_little_more():
  x = draw(4096, 16)
  w = quantise(x)
  # 1 / 2 + 1 / 64 + 4 / 64**2, of the docstring.
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(w)) / x.size == 0.5 + 1 / 64 + 4 / 64**2
  error = lambda w: float(jnp.sqrt(jnp.mean((dense(w) - x) ** 2)))
  exact = error(quantise(x, double=False))
  # Blocks of 64 normal numbers: 0.09 of their deviation is lost, and 0.2 % more by the scales.
  assert 0.085 < exact < 0.1
  assert error(w) < 1.005 * exact


@pytest.mark.parametrize('double', [True, False])
@pytest.mark.parametrize('transpose', [False, True])
def test_a_leaf_answers_as_its_array(transpose, double):
  w = quantise(draw(128, 6), double=double)
  x = draw(3, 6 if transpose else 128)
  array = np.asarray(dense(w))
  expected = np.asarray(x) @ (array.T if transpose else array)
  # f32 sums of 128 terms in another order.
  dot = jax.jit(weights.dot, static_argnums=2)
  np.testing.assert_allclose(dot(x, w, transpose), expected, atol=1e-4)
  ids = jnp.array([[0, 31, 32, 64, 127]])
  np.testing.assert_array_equal(take(w, ids), array[ids])
  assert jnp.isnan(take(w, jnp.array([128]))).all()


def test_rows_of_odd_blocks():
  w = quantise(draw(129, 2))  # Three blocks of 43 rows.
  ids = jnp.arange(129)
  np.testing.assert_array_equal(take(w, ids), dense(w))


def test_quantising_again_changes_nothing():
  for double in (False, True):
    w = quantise(draw(128, 8), double=double)
    again = add(w, jnp.zeros((128, 8)))
    np.testing.assert_allclose(dense(again), dense(w), rtol=1e-6)


def test_a_merge_keeps_the_mean_of_what_it_adds():
  w = quantise(draw(128, 32), double=False)
  # A thirtieth of the smallest distance between levels, not where the largest of a block are.
  scales = np.repeat(np.asarray(w.scales), 64, 0)
  inside = np.abs(dense(w)) < 0.99 * scales
  update = np.where(inside, 0.0025 * scales, 0).astype(np.float32)
  np.testing.assert_array_equal(add(w, update).codes, w.codes)
  keys = jax.random.split(jax.random.key(1), 300)
  added = jax.jit(lambda: jax.lax.map(lambda key: w.add(update, key).materialize(), keys))()
  share = np.asarray(added.mean(0) - dense(w))[inside] / update[inside]
  assert abs(share.mean() - 1) < 0.04  # Standard error 0.009: 1.2 M draws of odds near 1 / 50.


def test_zeros_stay_and_what_is_not_finite_shows():
  x = draw(64, 3).at[:, 0].set(0).at[0, 1].set(jnp.inf)
  array = np.asarray(dense(quantise(x)))
  np.testing.assert_array_equal(array[:, 0], 0)
  assert not np.isfinite(array[:, 1]).all()
  assert np.isfinite(array[:, 2]).all()


def test_shares_of_devices_hold_whole_blocks():
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
  x = draw(2, 512, 16)
  w = quantise(x)
  where = sharding.param_shardings({'w': x}, [('w', PartitionSpec(None, 'tensor', 'fsdp'))], mesh)
  placed = sharding.weight_shardings({'w': w}, where)['w']
  assert placed.codes.spec == placed.scales.codes.spec == PartitionSpec(None, 'tensor', 'fsdp')
  made = jax.jit(weights.quantise_nf4, out_shardings=placed)(jax.device_put(x, where['w']))
  jax.tree.map(np.testing.assert_array_equal, made, w)
  text = jax.jit(weights.materialize, out_shardings=where['w']).lower(made).compile().as_text()
  assert not hlo.collectives(text)


def test_a_loop_over_layers_keeps_codes_alone():
  """What a loss keeps for its backward pass, in a loop over 8 frozen matrices."""
  width, rows = 128, 16

  @functools.cache
  def temporaries(product, layers):
    def loss(x, kernel):
      body = lambda x, w: (jnp.tanh(product(x, w)), None)
      return jnp.sum(jax.lax.scan(body, x, kernel)[0])

    kernel = jax.eval_shape(weights.quantise_nf4, jnp.zeros((layers, width, width)))
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(x, kernel).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  x, matrix = 4 * rows * width, 4 * width * width
  # The tanh and its derivative a layer; and the matrix, where it is not frozen.
  assert temporaries(frozen_dot, 16) - temporaries(frozen_dot, 8) <= 8 * 2 * x + 512
  assert temporaries(weights.dot, 16) - temporaries(weights.dot, 8) >= 8 * matrix
  # Nor is anything of a matrix's size held besides: codes unpacked, scaled, and the product's copy.
  assert temporaries(frozen_dot, 8) < 8 * 2 * x + 3 * matrix


def test_an_adapter_trains_beside_it_and_merges_into_it():
  params = {'w': quantise(draw(128, 64))}
  spec = adapters.LoRA(rank=4, targets='w')
  adapted = jax.jit(lambda p: adapters.attach(p, spec, jax.random.key(0)))(params)
  assert list(adapters.trainable(adapted)['w']) == ['a', 'b']
  b = draw(4, 64, seed=3)
  adapted = {'w': dataclasses.replace(adapted['w'], b=b)}
  merged = jax.jit(adapters.merge)(adapted)['w']
  assert isinstance(merged, weights.NF4)
  exact = params['w'].materialize() + adapted['w'].a @ b
  _, expected = nearest(np.asarray(exact), 64)
  # Scales of 8 bits send a few numbers to the next level.
  assert np.mean(np.abs(dense(merged) - expected) > 0.02 * np.abs(expected).max()) < 0.02
  with pytest.raises(ValueError, match=r"^v is held in 4 bits .* rest='v'"):
    adapters.attach(
      {**params, 'v': params['w']}, adapters.LoRA(rank=4, targets='w', rest='v'), jax.random.key(0)
    )


def test_a_vector_is_refused_in_a_sentence():
  with pytest.raises(ValueError, match=r'\(3,\) is no matrix'):
    weights.quantise_nf4(jnp.ones(3))


@pytest.mark.parity
def test_codes_and_numbers_are_those_of_bitsandbytes():
  torch = pytest.importorskip('torch')
  functional = pytest.importorskip('bitsandbytes.functional')
  x = np.asarray(draw(256, 32))
  ours = quantise(jnp.asarray(x), double=False)
  # PyTorch's matrices are [out, in]: its blocks are neighbours along `in`, our m.
  theirs, state = functional.quantize_4bit(torch.tensor(x.T.copy()), blocksize=64, quant_type='nf4')
  np.testing.assert_array_equal(np.asarray(ours.scales).T.reshape(-1), state.absmax.numpy())
  expected = functional.dequantize_4bit(theirs, state).numpy().T
  # Numbers midway between two levels may go either way.
  same = np.isclose(dense(ours), expected, rtol=1e-6)
  assert same.mean() > 0.9995
