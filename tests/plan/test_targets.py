"""Names of devices, and the facts behind them."""

import jax
import pytest

from memjax.plan import targets

# The memory that each card is sold with.
PROMISED = {
  **{'t4': 16, 'l4': 24, 'rtx3090': 24, 'rtx4090': 24, 'rtx5090': 32, 'a100-40g': 40},
  **{'a100-80g': 80, 'h100-80g': 80, 'h200': 141, 'b200': 192},
}


@pytest.mark.parametrize(
  ('name', 'platform', 'devices'),
  [
    ('v5e:1x1', 'tpu', 1),
    ('v5e:16x16', 'tpu', 256),
    ('v5p:8x8x8', 'tpu', 512),
    ('v3:2x2', 'tpu', 8),  # Two cores a chip, and each is a device.
    ('v4:2x2x1', 'tpu', 4),  # Two cores a chip, that are one device.
    ('rtx4090', 'gpu', 1),
    ('h100-80g*8', 'gpu', 8),
    ('local', 'local', 8),
    ('cpu', 'local', 8),
  ],
)
def test_a_name_says_how_many_devices(name, platform, devices):
  target = targets.parse(name)
  assert (target.platform, target.devices) == (platform, devices)


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('v5e', "the nearest is 'v5e:1x1'"),
    ('rtx490', "the nearest is 'rtx4090'"),
    ('h100*8', r"the nearest is 'h100-80g\*8'"),
    ('V5E:2x4', "the nearest is 'v5e:2x4'"),
    ('v5e:2x0', "the nearest is 'v5e:1x1'"),
    ('', 'there are v2, v3'),
    ('h100-80g*64', 'more than one host holds'),
  ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, words):
  with pytest.raises(ValueError, match=words):
    targets.parse(name)


def test_every_kind_has_a_limit_and_a_source():
  rows = targets.known()
  names = [row['name'] for row in rows]
  assert set(PROMISED) <= set(names)
  assert {name.split(':')[0] for name in names} >= {'v2', 'v3', 'v4', 'v5e', 'v5p', 'v6e', 'tpu7x'}
  for row in rows:
    assert row['source']
    assert 7e9 < row['limit_bytes'] < 2e11
    if row['name'] in PROMISED:  # The driver and ECC keep some of it.
      gigabytes = PROMISED[row['name']]
      assert 0.9e9 * gigabytes <= row['limit_bytes'] <= 2**30 * gigabytes


def test_the_devices_of_a_slice_open_without_it():
  pytest.importorskip('libtpu')
  for name in ('v5e:2x2', 'v4:2x2x1', 'v5p:2x2x1', 'tpu7x:1x1x1'):
    target = targets.parse(name)
    devices = targets.open_devices(target)
    assert len(devices) == target.devices
    assert {device.platform for device in devices} == {'tpu'}
  assert targets.open_devices(targets.parse('local')) == jax.devices()


def test_a_slice_that_no_pod_has_is_refused_in_a_sentence():
  pytest.importorskip('libtpu')
  with pytest.raises(ValueError, match=r'v5e:3x3: the compiler knows no such device: .*3x3'):
    targets.open_devices(targets.parse('v5e:3x3'))


def test_the_limit_of_a_v4_is_that_of_a_whole_chip():
  assert targets.parse('v4:2x2x1').limit_bytes == 30.75 * 2**30


def test_a_gpu_compiler_without_its_libraries_is_named_with_its_extra(monkeypatch):
  def topology(*_, **__):
    raise RuntimeError('no libcudart')

  monkeypatch.setattr(targets, 'check_installed', lambda target: None)
  monkeypatch.setattr(targets, '_topology', topology)
  with pytest.raises(ValueError, match=r'rtx4090: .* pip install .memjax\[plan-gpu\].*libcudart'):
    targets.open_devices(targets.parse('rtx4090'))


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r'rtx4090: .* pip install .memjax\[plan-gpu\]'):
    targets.check_installed(targets.parse('rtx4090'))
  with pytest.raises(ValueError, match=r'v5e:1x1: .* pip install .memjax\[plan\]'):
    targets.check_installed(targets.parse('v5e:1x1'))
