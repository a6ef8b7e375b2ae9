"""Codes of 8 and 4 bits against the published maps, written as the official packages write them."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from memjax.transforms import codes


def dynamic_map(decades, signed):
  """bitsandbytes' `create_dynamic_map`: midpoints of equal steps in each decade, 0 and 1."""
  numbers = [0.0, 1.0]
  for i in range(decades):
    ends = np.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
    middles = 10.0 ** (i + 1 - decades) * (ends[:-1] + ends[1:]) / 2
    numbers += [*middles, *(-middles if signed else [])]
  return np.sort(numbers)


MAPS = {
  ('dynamic', 8, True): dynamic_map(7, True),
  ('dynamic', 8, False): dynamic_map(7, False),
  ('dynamic', 4, True): dynamic_map(3, True),
  ('dynamic', 4, False): np.arange(1, 17) / 16,
  ('linear', 8, True): np.arange(-127, 128) / 127,
  ('linear', 8, False): np.arange(1, 257) / 256,
  ('linear', 4, True): np.arange(-7, 8) / 7,
  ('linear', 4, False): np.arange(1, 17) / 16,
}


def test_the_maps_have_the_published_values():
  signed, unsigned = MAPS['dynamic', 8, True], MAPS['dynamic', 8, False]
  assert len(signed) == len(unsigned) == 256
  expected = [-0.99296874, -0.9789063, -0.96484375, -0.9507812]
  np.testing.assert_allclose(signed[:4], expected, rtol=1e-7)
  np.testing.assert_allclose(signed[126:129], [-5.5e-7, 0, 5.5e-7], rtol=1e-6)
  np.testing.assert_allclose(signed.sum(), 1.0, atol=1e-6)
  np.testing.assert_allclose(unsigned[:4], [0, 3.25e-7, 7.75e-7, 2.125e-6], rtol=1e-6)
  np.testing.assert_allclose(unsigned.sum(), 75.10526, rtol=1e-7)
  four = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
  published = [-x for x in four[::-1]] + [0, *four, 1]
  np.testing.assert_allclose(MAPS['dynamic', 4, True], published, atol=1e-9)


@pytest.mark.parametrize(('kind', 'bits', 'signed'), MAPS)
def test_decoding_gives_the_map_and_encoding_the_nearest(kind, bits, signed):
  code, numbers = codes.make(kind, bits, signed), MAPS[kind, bits, signed]
  every = jnp.arange(len(numbers), dtype=jnp.uint8)
  # The closed form rounds where the table was rounded once: 0.9 mantissa - 0.8 cancels to a tenth.
  np.testing.assert_allclose(code.decode(every), numbers, rtol=1e-6, atol=1e-9)
  np.testing.assert_array_equal(code.encode(jnp.asarray(numbers, jnp.float32)), every)

  rng = np.random.default_rng(0)
  x = rng.uniform(-1 if signed else 0, 1, 20_000) * 10.0 ** rng.uniform(-8, 0, 20_000)
  x = np.concatenate([x, numbers, [1.0, -1.0 if signed else 0.0]]).astype(np.float32)
  middles = (numbers[1:] + numbers[:-1]) / 2
  # Those within f32 rounding of a midpoint have two nearest codes.
  clear = np.min(np.abs(x[:, None] / middles - 1), axis=1, initial=1, where=middles != 0) > 1e-6
  nearest = np.searchsorted(middles, x)
  assert np.mean(clear) > 0.99
  np.testing.assert_array_equal(np.asarray(code.encode(jnp.asarray(x)))[clear], nearest[clear])


def test_the_published_example():
  """x[k] = sin(.37 k) exp(-k / 60), one block of 256 and one of 44."""
  k = np.arange(300)
  x = (np.sin(0.37 * k) * np.exp(-k / 60)).astype(np.float32)
  code = codes.make('dynamic', 8, True)
  scales = np.repeat([np.abs(x[:256]).max(), np.abs(x[256:]).max()], [256, 44])
  np.testing.assert_allclose(scales[[0, -1]], [0.9316535, 0.01334342], rtol=1e-6)
  found = np.asarray(code.encode(jnp.asarray(x / scales)))
  assert found[:8].tolist() == [127, 211, 233, 248, 255, 251, 238, 219]
  assert found[-4:].tolist() == [200, 167, 59, 48]
  assert found.sum(dtype=int) == 39370
  error = np.abs(np.asarray(code.decode(jnp.asarray(found))) * scales - x)
  np.testing.assert_allclose([error.max(), error.mean()], [0.00654535, 0.00147506], rtol=1e-5)


def test_fp8_rounds_as_numpy_does():
  code = codes.make('fp8', 8, True)
  x = np.random.default_rng(0).uniform(-1, 1, 4096).astype(np.float32)
  expected = (x * 448).astype(ml_dtypes.float8_e4m3fn)
  np.testing.assert_array_equal(code.encode(jnp.asarray(x)), expected)
  assert code.decode(code.encode(jnp.ones(1)))[0] == 1


def test_two_codes_share_a_byte():
  x = jnp.arange(16, dtype=jnp.uint8).reshape(2, 8)
  packed = codes.pack(x, -1)
  assert packed.shape == (2, 4)
  assert int(packed[0, 1]) == 1 * 16 + 5  # Numbers 1 and 1 + 8 / 2 of the block.
  np.testing.assert_array_equal(codes.unpack(packed, -1), x)


def test_what_does_not_exist_is_refused():
  with pytest.raises(ValueError, match='dynamic, linear, fp8'):
    codes.make('nf4', 4, True)
  with pytest.raises(ValueError, match='4 or 8'):
    codes.make('dynamic', 2, True)
  with pytest.raises(ValueError, match='8 bits'):
    codes.make('fp8', 4, True)
