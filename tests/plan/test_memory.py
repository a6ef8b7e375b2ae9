"""The receipt: shapes and shardings against live arrays, and parts against the compiler."""

import jax
import numpy as np
import pytest

from memjax import build, config, plan, sharding


def parts_of(optimizer, mesh):
  c = config.default()
  c.model, c.batch_size, c.seq_len = 'llama_tiny', 16, 16
  c.model_args = dict(loss_chunk=64, kv_heads=4)
  c.optimizer = config.optimizer(**optimizer)
  return build.build(c, mesh)


def receipt_of(parts, compiled=None):
  shardings, batch = jax.tree.map(lambda x: x.sharding, (parts.state, parts.batch))
  return plan.measure(parts.state, shardings, parts.batch, batch, compiled)


def bytes_on(device, tree):
  shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
  return sum(s.data.nbytes for s in shards if s.device == device)


@pytest.mark.parametrize('axes', [(1, 8, 1), (2, 2, 2)], ids=['fsdp', 'mixed'])
def test_parts_are_the_bytes_of_the_live_arrays(axes):
  parts = parts_of(dict(name='galore', learning_rate=0.01, rank=8), sharding.make_mesh(*axes))
  found = receipt_of(parts)['parts']
  state = parts.init(jax.random.key(0))
  device = jax.devices()[0]
  galore = state['opt'][0]  # Of the chain: GaLore, decay, learning rate.
  assert found['parameters'] == bytes_on(device, state['params'])
  assert found['basis'] == bytes_on(device, (galore.left, galore.right)) > 0
  assert found['moments'] == bytes_on(device, (galore.inner.mu, galore.inner.nu)) > 0
  state_bytes = found['parameters'] + found['basis'] + found['moments'] + found['other_state']
  assert state_bytes == bytes_on(device, state)
  batch = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), parts.batch)
  assert found['batch'] == bytes_on(device, batch)


def test_the_compiler_counts_the_same_arguments():
  parts = parts_of(dict(name='adafactor', learning_rate=0.01), sharding.make_mesh(1, 8, 1))
  receipt = receipt_of(parts, parts.step.lower(parts.state, parts.batch).compile())
  names = ('parameters', 'basis', 'moments', 'other_state', 'batch')
  assert receipt['compiled']['argument'] == sum(receipt['parts'][name] for name in names)
  assert receipt['compiled']['alias'] == receipt['compiled']['argument'] - receipt['parts']['batch']


def test_the_table_shows_every_part():
  parts = parts_of(dict(name='adamw', learning_rate=0.01), sharding.make_mesh(1, 8, 1))
  receipt = receipt_of(parts)
  table = plan.table(receipt, 'title')
  assert list(table.columns[0].cells) == [name.replace('_', ' ') for name in receipt['parts']]
