"""Noise: known answers of the hash, moments, places, meshes, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memjax.estimators import noise as noise_lib
from tests import hlo

ROOT = jax.random.key(0)
KEY = noise_lib.address(ROOT, 3, 'blocks/attn/q/kernel')
FAMILIES = {**noise_lib.FAMILIES, 'sparse': noise_lib.sparse(noise_lib.gaussian, 0.5)}


def u32(*words):
  return jnp.array(words, jnp.uint32)


@pytest.mark.parametrize(
  ('rounds', 'key', 'counter', 'word'),
  [
    # The known answers that come with the authors' Random123.
    (13, (0, 0), (0, 0), 0x9D1C5EC6),
    (13, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), 0xFD36D048),
    (13, (0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), 0xBA3E4725),
    (20, (0, 0), (0, 0), 0x6B200159),
  ],
)
def test_hash_gives_the_known_answers(rounds, key, counter, word):
  row, column = u32(*counter)
  assert int(noise_lib.hash_bits(u32(*key), row, column, rounds)) == word


@pytest.mark.parametrize('name', FAMILIES)
def test_moments(name):
  """Mean 0, variance 1 (the density, if masked), and no correlation of neighbours."""
  noise = FAMILIES[name]
  size, shape = 2**20, (1024, 1024)
  z = np.asarray(noise.draw(noise.key(ROOT, 0, 'w'), shape), np.float64)
  variance = 0.5 if name == 'sparse' else 1.0
  fourth = {'rademacher': 1.0, 'sparse': 1.5}.get(name, 3.0)
  near = lambda value, expected, spread: abs(value - expected) < 4 * spread / size**0.5
  assert near(z.mean(), 0, variance**0.5)
  assert near((z**2).mean(), variance, max(fourth - variance**2, 1e-9) ** 0.5)
  assert near((z**4).mean(), fourth, 10)  # The eighth moment of a normal is 105.
  for other in (np.roll(z, 1, 0), np.roll(z, 1, 1), z.T):
    off = (z * other)[z != other]  # The diagonal meets itself.
    assert near(off.mean(), 0, 1.5) or name == 'rademacher'
  if name == 'gaussian':
    # Tails: 2.7e-3 beyond three, 6.3e-5 beyond four; sign and magnitude are independent.
    for edge, share in ((1, 0.31731), (3, 0.0026998), (4, 6.334e-5)):
      assert near((np.abs(z) > edge).mean(), share, share**0.5)


def test_addresses_differ_in_every_part():
  noise = noise_lib.gaussian
  draws = [
    noise.draw(noise.key(root, step, path, None if layer is None else jnp.array([layer])), shape)
    for root, step, path, layer, shape in [
      (ROOT, 0, 'a', None, (64,)),
      (jax.random.key(1), 0, 'a', None, (64,)),
      (ROOT, 1, 'a', None, (64,)),
      (ROOT, 0, 'b', None, (64,)),
      (ROOT, 0, 'a', 0, (1, 64)),
      (ROOT, 0, 'a', 1, (1, 64)),
    ]
  ]
  flat = np.stack([np.asarray(z).reshape(-1) for z in draws])
  correlation = np.abs(np.corrcoef(flat) - np.eye(len(flat)))
  assert correlation.max() < 0.5  # 4 / sqrt(64).


@pytest.mark.parametrize('name', FAMILIES)
def test_rows_layers_and_windows_are_those_of_the_whole(name):
  noise = FAMILIES[name]
  keys = noise.key(ROOT, 0, 'blocks/w', jnp.arange(3))
  whole = noise.draw(keys, (3, 8, 5))
  np.testing.assert_array_equal(noise.draw(keys[1], (8, 5)), whole[1])
  np.testing.assert_array_equal(
    noise.draw(noise.key(ROOT, 0, 'blocks/w', jnp.array([2])), (1, 8, 5))[0], whole[2]
  )
  ids = jnp.array([[7, 0], [3, 3]])
  np.testing.assert_array_equal(noise.rows(keys[0], ids, 5), whole[0][ids])


@pytest.mark.parametrize('name', FAMILIES)
def test_bits_are_the_same_on_any_mesh_and_nothing_is_sent(name):
  noise = FAMILIES[name]
  key = noise.key(ROOT, 0, 'w')
  expected = np.asarray(jax.jit(lambda key: noise.draw(key, (16, 24)))(key))
  for sizes, spec in (((8, 1), P('a')), ((2, 4), P('a', 'b')), ((1, 8), P(None, 'b'))):
    mesh = jax.make_mesh(sizes, ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    draw = jax.jit(lambda key: noise.draw(key, (16, 24)), out_shardings=NamedSharding(mesh, spec))
    compiled = draw.lower(key).compile()
    np.testing.assert_array_equal(draw(key), expected)
    assert hlo.collectives(compiled.as_text()) == []
    assert 'f32[16,24]' not in compiled.as_text()  # A device draws its shard alone.


@pytest.mark.parametrize('density', [0.1, 0.5, 0.9, 1.0])
def test_density_is_what_was_asked_for(density):
  """To four standard errors of 2**18 numbers, well under a hundredth."""
  noise = noise_lib.sparse(noise_lib.rademacher, density, resample_every=10)
  draw = lambda step: np.asarray(noise.draw(noise.key(ROOT, step, 'w'), (512, 512)))
  first, same, other = draw(0), draw(9), draw(10)
  assert abs((first != 0).mean() - density) <= 4 * (density * (1 - density)) ** 0.5 / 512
  np.testing.assert_array_equal(first != 0, same != 0)
  assert (first != same).any()
  if density < 1:
    assert ((first != 0) != (other != 0)).any()


def test_refusals():
  with pytest.raises(ValueError, match="no noise is called 'gausian'; the nearest is 'gaussian'"):
    noise_lib.family('gausian')
  with pytest.raises(ValueError, match='density is 0'):
    noise_lib.sparse(noise_lib.gaussian, 0)
  with pytest.raises(ValueError, match='resample_every is 0'):
    noise_lib.sparse(noise_lib.gaussian, 0.5, 0)
