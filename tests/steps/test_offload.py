"""Optimizer state in host memory: same bits, other memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from memjax import checkpoint, sharding
from memjax.steps import groups, layerwise, offload, slices, whole_tree
from memjax.steps.rotations import hift
from memjax.transforms import keep_master
from tests.steps.test_layerwise_transforms import Toy, batch_of, init_params

RULES = ((r'mlp/kernel', P(None, 'fsdp')), (r'.*', P()))
ADAMW = optax.adamw(0.01)
LAYERS = 3


def place(init, transform, fraction):
  """Training state on two devices, with a fraction of the optimizer's in host memory."""
  params = jax.eval_shape(init_params, None)
  shape = jax.eval_shape(init, jax.random.key(0))
  mesh = sharding.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
  where = sharding.param_shardings(params, RULES, mesh)
  opt = sharding.state_shardings(shape['opt'], params, where)
  shardings = {
    'step': jax.NamedSharding(mesh, P()),
    'params': where,
    'opt': offload.place(
      shape['opt'],
      opt,
      jax.tree.structure(shape['opt']),
      slices.plan(optax.with_extra_args_support(transform), params),
      fraction,
    ),
  }
  return jax.jit(init, out_shardings=shardings)(jax.random.key(0)), shardings


def bytes_on(kind, tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree) if x.sharding.memory_kind == kind)


def assert_same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_state_on_the_host_gives_the_same_bits():
  init = lambda key: whole_tree.init_state(init_params, ADAMW, key)
  ends = []
  for fraction in (0.0, 0.6):
    state, shardings = place(init, ADAMW, fraction)
    everything = bytes_on('pinned_host', state['opt']) + bytes_on('device', state['opt'])
    assert bytes_on('pinned_host', state['opt']) <= fraction * everything
    assert bytes_on('pinned_host', state['opt']) >= (fraction - 0.2) * everything
    step = jax.jit(
      layerwise.make_train_step(Toy(), ADAMW, clip_norm=1.0, shardings=shardings),
      donate_argnums=0,
      out_shardings=(shardings, None),
    )
    for i in range(3):
      state, _ = step(state, batch_of(i))
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    ends.append(jax.device_get(state))
  assert_same_bits(ends[0], ends[1])


def test_groups_resume_with_the_same_bits(tmp_path):
  """Killed in the middle of a cycle, every moment in host memory."""
  rotation = hift(LAYERS, size=2)
  optimizer = lambda schedule: optax.adamw(schedule)
  init = lambda key: groups.init_state(init_params, optimizer, rotation, key)
  state, shardings = place(init, optax.adamw(lambda count: 0.01), 1.0)
  counts = 4 * 5  # Adam's, one a unit.
  assert bytes_on('device', state['opt']) <= 2 * counts
  step = jax.jit(
    groups.make_train_step(
      Toy(), optimizer, rotation, lambda count: 0.01 / (1 + count), shardings=shardings
    ),
    out_shardings=(shardings, None),
  )
  with checkpoint.Checkpoints(tmp_path / 'saved', every=1) as checkpoints:
    for i in range(5):
      if i == 2:
        checkpoints.maybe_save(state, i, {}, force=True)
      state, _ = step(state, batch_of(i))
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  with checkpoint.Checkpoints(tmp_path / 'saved', every=1) as checkpoints:
    restored = checkpoints.restore(shapes)
  again = restored.state
  assert restored.step == 2
  assert jax.tree.map(lambda x: x.sharding, again) == shardings
  for i in range(2, 5):
    again, _ = step(again, batch_of(i))
  assert step._cache_size() == 1
  assert_same_bits(jax.device_get(state), jax.device_get(again))


def test_fresh_state_is_sent_there_layer_by_layer():
  """The same bits as all at once, constants and copies of parameters."""
  halve = lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(None))
  transform, params = keep_master(ADAMW), jax.eval_shape(halve)
  mesh = sharding.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
  shape = jax.eval_shape(transform.init, params)
  where = sharding.param_shardings(params, RULES, mesh)
  opt = sharding.state_shardings(shape, params, where)
  slots = slices.plan(transform, params)
  treedef = jax.tree.structure(shape)
  placed = offload.place(shape, opt, treedef, slots, 1.0)
  init = lambda: offload.store_all(transform.init(halve()), placed, treedef, slots)
  state = jax.jit(init, out_shardings=placed)()
  assert jax.tree.map(lambda x: x.sharding, state) == placed
  assert bytes_on('device', state) < bytes_on('pinned_host', state) / 100
  assert_same_bits(state, transform.init(halve()))


@pytest.mark.parametrize('fraction', [0.0, 0.5, 1.0])
def test_largest_leaves_are_moved_first(fraction):
  here = jax.NamedSharding(sharding.make_mesh(), P())
  state = {'a': jax.ShapeDtypeStruct((3,), 'float32'), 'b': jax.ShapeDtypeStruct((5,), 'float32')}
  slots = [slices.Slot('head/a', False), slices.Slot('head/b', False)]
  treedef = jax.tree.structure(state)
  placed = offload.place(state, {'a': here, 'b': here}, treedef, slots, fraction)
  kinds = {name: s.memory_kind for name, s in placed.items()}
  expected = {
    0.0: {'a': 'device', 'b': 'device'},
    0.5: {'a': 'pinned_host', 'b': 'device'},
    1.0: {'a': 'pinned_host', 'b': 'pinned_host'},
  }
  assert kinds == expected[fraction]
