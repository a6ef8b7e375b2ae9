"""What models take that are trained by forward passes alone, by a TPU's compiler; minutes each."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import memjax
from memjax import config, sharding
from memjax.estimators.log import row_fingerprint
from memjax.plan import targets
from memjax.steps import streams

pytest.importorskip('libtpu')
pytestmark = pytest.mark.slow

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize(
  ('name', 'target', 'most'),
  [
    ('mezo_llama7b', 'v5e:1x1', 13.0),
    ('lozo_llama7b', 'v5e:1x1', 13.0),
    ('mezo_opt13b', 'v6e:1x1', 29.0),
    ('zo2_opt13b', 'v5e:1x1', 4.2),
    ('zo2_opt66b', 'v5e:1x1', 7.5),
    ('zo2_opt175b', 'v5e:1x1', 11.0),
  ],
)
def test_large_models_train_by_forward_passes(name, target, most):
  """One sequence of 2,048 tokens; `most` in GiB. A v5e has 15.75, a v6e 31.25."""
  c = config.load(str(CONFIGS / f'{name}.py'))
  c.batch_size, c.accumulate, c.seq_len = 1, 1, 2048
  (receipt,) = memjax.plan(c, targets=[target])
  peak = receipt['peak_bytes'] / 2**30
  print(f'{name} on {target}: {peak:.2f} GiB, {receipt["host_bytes"] / 2**30:.1f} on the host')
  assert receipt['fits']
  assert peak <= most
  if name.startswith('zo2'):  # The blocks are in the host's memory, once.
    assert receipt['parts']['parameters'] < 0.1 * receipt['host_bytes']


def test_the_rows_of_a_log_are_fetched_one_matrix_after_the_other():
  """And not while the head is at work."""
  mesh = sharding.make_mesh(devices=targets.open_devices(targets.parse('v5e:1x1')))
  host = jax.NamedSharding(mesh, jax.P(), memory_kind='pinned_host')
  matrix = jax.ShapeDtypeStruct((2, 1024, 1024), jnp.bfloat16, sharding=host)
  blocks = dict.fromkeys('abcdef', matrix)
  x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=host.with_memory_kind('device'))

  def program(blocks, x):
    rows, value = streams.first_rows(blocks, dict.fromkeys(blocks, host), jnp.sum(x @ x))
    return value, row_fingerprint(rows)

  memory = jax.jit(program).lower(blocks, x).compile().memory_analysis()
  assert 2**21 <= memory.temp_size_in_bytes < 1.2 * 2**21  # Of 2 MiB each.
