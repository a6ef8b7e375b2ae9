"""Slices cover an array, however many there are: a GPU takes fewer of them than a CPU does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.transforms import slices


@pytest.mark.parametrize(
  ('shape', 'count'),
  [
    *(((8, 16), count) for count in (1, 2, 8)),
    *(((4, 6, 16), count) for count in (1, 2, 4, 8, 24)),
  ],
)
def test_every_number_is_visited_once(shape, count):
  x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  seen = []

  def add(at, pair, total):
    seen.append((pair[0].size, total))
    return pair[0] + 1, pair[1] * 2

  once = jax.jit(lambda pair: slices.run(add, pair, slices.Counts(count, count)))
  one, two = once((x, x))
  np.testing.assert_array_equal(one, x + 1)
  np.testing.assert_array_equal(two, x * 2)
  assert {pair for pair in seen} == {(x.size // count, count)}


@pytest.mark.parametrize('shape', [(64, 128), (2, 64, 128)])
def test_a_gpu_takes_its_own_number_of_slices(shape, monkeypatch):
  """The branch for GPUs, run here: a matrix that is several slices elsewhere and one there."""
  monkeypatch.setattr(slices, 'NUMBERS', 1024)
  counts = slices.count(shape, 1)
  assert counts.default > counts.gpu
  choose = lambda *args, cuda, rocm, default: cuda(*args)
  monkeypatch.setattr(jax.lax, 'platform_dependent', choose)
  x = jnp.ones(shape)
  after = slices.run(lambda at, x, total: x + 1, x, counts)
  np.testing.assert_array_equal(after, x + 1)
