"""What models take that are trained by forward passes alone, by a TPU's compiler; minutes each."""

import pathlib

import pytest

import memjax
from memjax import config

pytest.importorskip('libtpu')
pytestmark = pytest.mark.slow

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@pytest.mark.parametrize(
  ('name', 'target', 'most'),
  [
    ('mezo_llama7b', 'v5e:1x1', 13.0),
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
