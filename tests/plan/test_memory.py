"""Bytes by part: shapes and shardings against live arrays, and against the compiler's count."""

import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import build, config, optimizers, sharding
from memjax.evaluate import place
from memjax.naming import path_string
from memjax.plan import memory, recommend
from memjax.train import load_data
from tests import launch

CONFIGS = sorted(p.name for p in (launch.ROOT / 'configs').glob('*.py'))


def parts_of(optimizer, mesh, **changes):
  c = config.default()
  c.model, c.batch_size, c.seq_len = 'llama_tiny', 16, 16
  c.model_args = dict(loss_chunk=64, kv_heads=4)
  c.optimizer = config.optimizer(**optimizer)
  c.update(changes)
  return build.build(c, mesh)


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def bytes_on(device, tree):
  shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
  return sum(s.data.nbytes for s in shards if s.device == device)


def zeros(tree):
  return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), tree)


@pytest.mark.parametrize('axes', [(1, 8, 1), (2, 2, 2)], ids=['fsdp', 'mixed'])
def test_parts_are_the_bytes_of_the_live_arrays(axes):
  parts = parts_of(dict(name='galore', learning_rate=0.01, rank=8), sharding.make_mesh(*axes))
  found = memory.argument_parts(parts.state, parts.batch)
  state = parts.init(jax.random.key(0))
  device = jax.devices()[0]
  galore = state['opt'][0]  # Of the chain: GaLore, decay, learning rate.
  assert found['parameters'] == bytes_on(device, state['params'])
  assert found['basis'] == bytes_on(device, (galore.left, galore.right)) > 0
  assert found['moments'] == bytes_on(device, (galore.inner.mu, galore.inner.nu)) > 0
  assert found['batch'] == bytes_on(device, zeros(parts.batch))
  assert sum(found.values()) - found['batch'] == bytes_on(device, state)


@pytest.mark.parametrize('file', CONFIGS)
def test_arguments_of_every_config_are_the_bytes_of_the_live_arrays(file):
  c = config.load(str(launch.ROOT / 'configs' / file) + ':smoke')
  rows = c.batch_size if c.select.name == 'none' else c.select.keep
  devices = jax.devices()[: math.gcd(8, rows // c.accumulate)]
  parts = build.build(c, sharding.make_mesh(data=1, fsdp=-1, devices=devices))
  found = memory.argument_parts(parts.state, parts.batch)
  on_host = memory.host_bytes(parts.state, parts.batch)
  assert (on_host > 0) == (c.step == 'streamed')
  # A CPU device's arrays are all that is alive, those in its host's memory too.
  live = bytes_on(jax.devices()[0], zeros((parts.state, parts.batch)))
  assert sum(found.values()) + on_host == live


# Of every kind that differs in what is kept: a pool of task rows and factors beside the weights,
# quantised weights and state, frozen ones, blocks on the host.
KINDS = ('colm_phi2', 'q_galore_llama7b', 'qlora_llama7b', 'zo2_opt13b')


@pytest.mark.parametrize('name', KINDS)
def test_what_a_run_makes_is_what_the_receipt_counts(name):
  c = config.load(str(launch.ROOT / f'configs/{name}.py:smoke'))
  parts = build.build(c, one_device())
  state = parts.init(build.root_key(c, 'params'))
  train = load_data(c, parts.model).train

  def rows(start, stop):
    found = train.rows(0, c.batch_size, start, stop, c.seed)
    return {'source': np.zeros(stop - start, np.int32)} | found

  found = memory.argument_parts(parts.state, parts.batch)
  device, on_host = jax.devices()[0], memory.host_bytes(parts.state)
  assert bytes_on(device, place(rows, parts.batch)) == found['batch']
  assert bytes_on(device, state) == sum(found.values()) - found['batch'] + on_host


def test_arguments_of_7b_by_hand():
  """bf16 parameters; two f32 moments a number, and the two counts."""
  c = config.load(str(launch.ROOT / 'configs/adamw_llama7b.py'))
  parts = build.build(c, one_device())
  n = 6_738_415_616
  assert memory.argument_parts(parts.state, parts.batch) == {
    'parameters': 2 * n,
    'adapters': 0,
    'basis': 0,
    'moments': 8 * n,
    'other_state': 4 * 3,  # Of the step, of Adam, of the schedule.
    'batch': 12 * 512 * 256,
  }
  # bf16 of a micro-batch and their f32 sum; layer by layer, the head's or embedding's in f32.
  assert memory.gradient_bytes(parts.state, accumulate=32) == 6 * n
  assert memory.gradient_bytes(parts.state) == 2 * n
  layer = 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
  assert memory.gradient_bytes(parts.state, layerwise=True) == 2 * layer > 2 * 32_000 * 4096


def test_the_compiler_counts_the_same_arguments_and_reuses_the_state():
  parts = parts_of(dict(name='adafactor', learning_rate=0.01), sharding.make_mesh(1, 8, 1))
  found = memory.argument_parts(parts.state, parts.batch)
  compiled = parts.step.lower(parts.state, parts.batch).compile()
  sizes = memory.of_compiled(compiled)
  assert sizes['argument'] == sum(found.values())
  assert memory.check_donated(compiled, parts.state) == sizes['argument'] - found['batch']
  # The CPU compiler's own peak leaves out the temporaries, of which there are some.
  assert memory.device_peak(sizes, 'cpu') > sizes['temp'] + sizes['argument'] > sizes['peak']


def test_a_state_that_is_not_donated_is_refused():
  state = {'params': {'w': jax.ShapeDtypeStruct((8, 4), jnp.float32)}}
  step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state))
  with pytest.raises(ValueError, match=r'reuses 0 of the 128 bytes.*donate_argnums'):
    memory.check_donated(step.lower(state).compile(), state)


class Packed(typing.NamedTuple):
  codes: jax.Array
  scales: jax.Array


class Subspace(typing.NamedTuple):
  count: jax.Array
  left: typing.Any
  inner: typing.Any


class Moments(typing.NamedTuple):
  mu: typing.Any
  nu: typing.Any
  norm: typing.Any


def test_state_is_told_apart_by_the_fields_around_it():
  packed = Packed(jnp.zeros(10, jnp.int8), jnp.zeros(1))  # 14 bytes.
  # The parameters' own names mean nothing: only fields do.
  inner = Moments(mu={'left': packed}, nu={'w': jnp.zeros(3)}, norm={'mu': jnp.zeros(2)})
  state = {
    'params': {'mu': jnp.zeros(5)},
    'opt': (Subspace(jnp.zeros([], jnp.int32), {'mu': packed}, inner),),
    'step': jnp.zeros([], jnp.int32),
  }
  found = memory.argument_parts(state, {'tokens': jnp.zeros(6, jnp.int32)})
  assert found == {
    'parameters': 20,
    'adapters': 0,
    'basis': 14,
    'moments': 14 + 12,
    'other_state': 4 + 4 + 8,
    'batch': 24,
  }


def test_adapters_are_counted_apart_and_alone_have_gradients():
  class LowRank(typing.NamedTuple):
    base: jax.Array
    a: jax.Array
    b: jax.Array

  weight = LowRank(jnp.zeros((8, 8)), jnp.zeros((8, 1)), jnp.zeros((1, 8)))
  state = {'params': {'a': {'kernel': weight}}, 'opt': ()}
  found = memory.argument_parts(state, ())
  assert (found['parameters'], found['adapters']) == (256, 64)
  assert memory.gradient_bytes(state) == 64


def test_what_lives_on_the_host_takes_no_device_memory():
  device = jax.devices()[0]
  host = jax.sharding.SingleDeviceSharding(device, memory_kind='pinned_host')
  state = {
    'params': {
      'w': jax.ShapeDtypeStruct((4,), jnp.float32, sharding=host),
      'b': jax.ShapeDtypeStruct((3,), jnp.float32),
    }
  }
  assert memory.argument_parts(state, ())['parameters'] == 12
  assert memory.host_bytes(state) == 16


def test_files_in_memory_count_as_free(tmp_path, monkeypatch):
  """Of a control group of 1,000 bytes in which 900 are used, 300 of them by cached files."""
  stat = 'anon 600\ninactive_file 300'
  for name, text in {'memory.max': '1000', 'memory.current': '900', 'memory.stat': stat}.items():
    (tmp_path / name).write_text(text + '\n')
  monkeypatch.setattr(memory, '_CGROUP', tmp_path)
  assert memory.host_available() == 400
  (tmp_path / 'memory.max').write_text('max\n')
  assert memory.host_available() > 2**20


def test_every_state_leaf_of_every_optimizer_is_small_or_has_a_part():
  """Other state is counts and the like: a leaf of a matrix's size belongs to a part."""
  c = config.default()
  params = jax.eval_shape(build.build_model(c, one_device()).init, jax.random.key(0))
  for name in optimizers.OPTIMIZERS:
    transform = build.build_transform(recommend.with_method(c, name), 0.1)
    state = jax.eval_shape(transform.init, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path({'opt': state}):
      if leaf.size > 256:
        assert memory.part_of(path) != 'other_state', f'{name}: {path_string(path)} {leaf.shape}'
