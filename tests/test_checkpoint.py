import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from memjax import checkpoint
from memjax.checkpoint import Checkpoints, check_writable, digest

AXES = ('data', 'fsdp', 'tensor')


def make_mesh(shape, axis_type=AxisType.Auto):
  return jax.make_mesh(
    shape, AXES, axis_types=(axis_type,) * 3, devices=jax.devices()[: np.prod(shape)]
  )


def shardings(tree, mesh):
  """Matrices over (fsdp, tensor), everything else replicated."""

  def one(leaf):
    matrix = leaf.ndim >= 2 and all(n % 8 == 0 for n in leaf.shape[-2:])
    spec = P(*[None] * (leaf.ndim - 2), 'fsdp', 'tensor') if matrix else P()
    return NamedSharding(mesh, spec)

  return jax.tree.map(one, tree)


def abstract(state, mesh):
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings(state, mesh)
  )


def make_state(mesh, seed=0, d=64):
  """A training state with every container that optax makes, and every dtype that methods store."""
  rng = np.random.default_rng(seed)
  params = {
    'blocks': {'attn': {'q': {'kernel': rng.standard_normal((2, d, d), np.float32)}}},
    'head': {'kernel': rng.standard_normal((d, 16), np.float32).astype(jnp.bfloat16)},
    'final_norm': {'scale': rng.standard_normal(d, np.float32)},
  }
  tx = optax.chain(
    optax.masked(
      optax.scale_by_adam(mu_dtype=jnp.bfloat16), jax.tree.map(lambda p: p.ndim > 1, params)
    ),
    optax.identity(),
    optax.add_decayed_weights(0.1),
  )
  moments = {
    'int8': rng.integers(-128, 128, (8, 8), np.int8),
    'uint8': rng.integers(0, 256, 3, np.uint8),
    'none': None,
  }
  state = {'step': np.int32(7), 'params': params, 'opt': (tx.init(params), moments)}
  return copies(jax.device_put(state, shardings(state, mesh)))


@jax.jit
def copies(tree):
  """In buffers of XLA's own, as a jitted initialiser makes them."""
  return jax.tree.map(jnp.copy, tree)


def to_host(tree):
  """Copies: `np.asarray` on CPU would be a view of a buffer that a step may reuse."""
  return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def assert_same_bits(tree, reference):
  assert jax.tree.structure(tree) == jax.tree.structure(reference)
  for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(reference)):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert x.tobytes() == y.tobytes()


def pointers(tree):
  return [
    shard.data.unsafe_buffer_pointer()
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
  ]


@jax.jit(donate_argnums=0)
def step_in_place(state):
  return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)


@pytest.fixture
def mesh():
  return make_mesh((1, 8, 1))


@pytest.fixture
def warned(caplog):
  """Messages of absl's warnings, which do not reach the root logger by themselves."""
  logger = logging.getLogger('absl')
  logger.addHandler(caplog.handler)
  yield lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
  logger.removeHandler(caplog.handler)


# ---- the digest


def reference_digest(x):
  """The formula of `digest`, an element at a time in Python's integers."""
  x = np.asarray(x).ravel()
  words = x.view(f'u{min(x.itemsize, 4)}')
  total = 0
  for i, word in enumerate(words.tolist()):
    word ^= i * 0x9E3779B9 % 2**32
    word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
    word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
    total += word ^ (word >> 16)
  return total % 2**32


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'int8', 'uint8', 'int32', 'bool', 'float8_e4m3fn']
)
def test_digest_follows_its_formula(dtype):
  x = (jax.random.normal(jax.random.key(0), (3, 5, 7)) * 50).astype(dtype)
  assert int(digest(x)) == reference_digest(x)


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 2, 2), (1, 1, 1)])
def test_digest_is_the_same_on_any_mesh(shape, axis_type):
  x = jax.random.normal(jax.random.key(1), (4, 16, 8))
  sharded = jax.device_put(x, NamedSharding(make_mesh(shape, axis_type), P(None, 'fsdp', 'tensor')))
  assert int(jax.jit(digest)(sharded)) == reference_digest(x)


def test_digest_of_a_leaf_in_host_memory(mesh):
  x = jax.random.normal(jax.random.key(1), (4, 16, 8), jnp.bfloat16)
  sharding = NamedSharding(mesh, P(None, 'fsdp', None), memory_kind='pinned_host')
  assert checkpoint._digests({'x': jax.device_put(x, sharding)}) == {'x': reference_digest(x)}


def test_digest_sees_flips_swaps_and_signs():
  x = np.asarray(jax.random.normal(jax.random.key(2), (8, 8)))
  swapped, signs = x.copy(), x.copy()
  swapped[0, 0], swapped[0, 1] = x[0, 1], x[0, 0]
  signs[0, :2] *= -1  # Two top bits: a sum with odd weights would cancel them.
  flipped = x.copy()
  flipped.view(np.uint32)[5, 5] ^= 1
  assert len({int(digest(jnp.asarray(y))) for y in (x, swapped, signs, flipped)}) == 4


def test_digest_does_not_gather(mesh):
  x = jax.ShapeDtypeStruct(
    (8, 256, 256), jnp.float32, sharding=NamedSharding(mesh, P(None, 'fsdp'))
  )
  compiled = jax.jit(digest).lower(x).compile()
  assert 'all-gather' not in compiled.as_text()
  assert 'all-to-all' not in compiled.as_text()
  # XLA's CPU compiler keeps the mixed words of one shard; TPU and GPU compilers fuse them away.
  assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * x.size * 4 / 8


# ---- saving and restoring


@pytest.mark.parametrize(
  ('shape', 'axis_type'),
  [
    ((1, 8, 1), AxisType.Auto),
    ((2, 2, 2), AxisType.Auto),
    ((2, 2, 2), AxisType.Explicit),
    ((1, 1, 1), AxisType.Auto),
  ],
)
def test_restores_bit_for_bit_on_any_mesh(tmp_path, mesh, shape, axis_type):
  state = make_state(mesh)
  reference = to_host(state)
  target = abstract(state, make_mesh(shape, axis_type))
  with Checkpoints(tmp_path / 'ckpt', every=5) as ckpt:
    assert ckpt.maybe_save(state, 5, {'data': {'epoch': 1, 'position': [3, 4]}})
  with Checkpoints(tmp_path / 'ckpt', every=5) as ckpt:
    restored = ckpt.restore(target)
  assert restored.step == 5
  assert restored.metadata == {'data': {'epoch': 1, 'position': [3, 4]}}
  assert_same_bits(restored.state, reference)
  for leaf, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target)):
    assert leaf.sharding == want.sharding
    assert leaf.committed


def test_restores_leaves_in_host_memory(tmp_path, mesh):
  state = make_state(mesh)
  state['params'] = jax.tree.map(
    lambda x: jax.device_put(x, x.sharding.with_memory_kind('pinned_host')), state['params']
  )
  reference = to_host(state)
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  with Checkpoints(tmp_path, every=1) as ckpt:
    ckpt.maybe_save(state, 1, None)
    restored = ckpt.restore(target)
  assert_same_bits(restored.state, reference)
  assert {x.sharding.memory_kind for x in jax.tree.leaves(restored.state['params'])} == {
    'pinned_host'
  }


def test_empty_directory_restores_nothing(tmp_path, mesh):
  with Checkpoints(tmp_path, every=1) as ckpt:
    assert ckpt.restore(abstract(make_state(mesh), mesh)) is None


def test_saves_on_schedule_and_keeps_what_was_asked(tmp_path, mesh):
  state = make_state(mesh)
  with Checkpoints(tmp_path, every=2, keep=2, keep_every=6) as ckpt:
    saved = [step for step in range(1, 15) if ckpt.maybe_save(state, step, None)]
    assert saved == [2, 4, 6, 8, 10, 12, 14]
    ckpt.wait()
    assert ckpt.steps() == [6, 12, 14]  # Newest two, and the multiples of six.
    assert not ckpt.maybe_save(state, 14, None, force=True)
    assert ckpt.maybe_save(state, 15, None, force=True)
    ckpt.wait()
    assert ckpt.steps() == [6, 12, 14, 15]


def test_async_save_survives_donation(tmp_path):
  mesh = make_mesh((1, 1, 1))  # One shard per leaf: orbax may save a view of it.
  state = make_state(mesh, d=1024)
  reference = to_host(state)
  with Checkpoints(tmp_path, every=1) as ckpt:
    ckpt.maybe_save(state, 1, None)
    for _ in range(3):
      state = step_in_place(state)
    jax.block_until_ready(state)
    restored = ckpt.restore(abstract(state, mesh))
  assert_same_bits(restored.state, reference)


@pytest.mark.parametrize('shape', [(1, 8, 1), (1, 1, 1)])
def test_restored_state_is_donated_like_a_fresh_one(tmp_path, shape):
  mesh = make_mesh(shape)
  fresh = make_state(mesh)
  with Checkpoints(tmp_path, every=1) as ckpt:
    ckpt.maybe_save(fresh, 1, None)
    restored = ckpt.restore(abstract(fresh, mesh)).state
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    for state in (make_state(mesh, seed=1), restored):
      before = pointers(state)
      after = step_in_place(state)
      assert pointers(after) == before
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_memory_of_numpy_is_not_donated_away():
  backing = np.zeros((1 << 16) + 16, np.float32)
  start = (
    -backing.ctypes.data // 4 % 16
  )  # 64-byte alignment, at which the CPU backend copies nothing.
  view = backing[start : start + (1 << 16)]
  leaf = jax.device_put(view, jax.devices()[0])
  assert leaf.unsafe_buffer_pointer() == view.ctypes.data
  owned = checkpoint._own(leaf)
  pointer = owned.unsafe_buffer_pointer()
  assert pointer != view.ctypes.data
  assert step_in_place(owned).unsafe_buffer_pointer() == pointer
  assert not view.any()


# ---- refusals


def test_another_model_is_refused(tmp_path, mesh):
  state = make_state(mesh)
  with Checkpoints(tmp_path, every=1) as ckpt:
    ckpt.maybe_save(state, 1, None)
    wider = abstract(make_state(mesh, d=128), mesh)
    with pytest.raises(ValueError, match=r'(?s)128.*64.*another work directory'):
      ckpt.restore(wider)
    for key, leaf in (('extra', jnp.zeros(3)), ('head', jnp.zeros(3))):
      other = dict(state, params=dict(state['params'], **{key: leaf}))
      with pytest.raises(ValueError, match=f'params/{key}: this run has float32.*no such leaf'):
        ckpt.restore(abstract(other, mesh))
    del state['params']['head']
    with pytest.raises(ValueError, match='params/head/kernel: this run has no such leaf'):
      ckpt.restore(abstract(state, mesh))
    assert ckpt.steps() == [1]  # Not damage: nothing was moved.


def test_metadata_must_be_json(tmp_path, mesh):
  with (
    Checkpoints(tmp_path, every=1) as ckpt,
    pytest.raises(ValueError, match='metadata must be JSON'),
  ):
    ckpt.maybe_save(make_state(mesh), 1, {'iterator': object()})


@pytest.mark.parametrize('argument', ['every', 'keep', 'keep_every'])
def test_intervals_must_be_positive(tmp_path, argument):
  with pytest.raises(ValueError, match=f'{argument} is 0'):
    Checkpoints(tmp_path, **{'every': 1, argument: 0})


def test_unwritable_directories_are_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  for bad in (tmp_path / 'file', tmp_path / 'file' / 'below', '/proc/memjax', '/dev/null/x'):
    with pytest.raises(ValueError, match=r'cannot be written .* choose another work directory'):
      check_writable(bad)
  check_writable(tmp_path / 'new' / 'deep')
  assert list((tmp_path / 'new' / 'deep').iterdir()) == []


# ---- damage


def checkpoint_files(directory):
  return sorted(p.relative_to(directory) for p in directory.rglob('*') if p.is_file())


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def flip_bytes(path):
  data = bytearray(path.read_bytes())
  for i in range(len(data) // 2, min(len(data) // 2 + 3, len(data))):
    data[i] ^= 0x10
  path.write_bytes(data)


def zero_out(path):
  path.write_bytes(bytes(path.stat().st_size))


# orbax leaves the coroutines of a failed read to the garbage collector, which complains.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('harm', [truncate, flip_bytes, zero_out, os.remove])
def test_no_damage_to_any_file_goes_unseen(tmp_path, harm, warned):
  rng = np.random.default_rng(0)
  old, new = ({'x': jnp.asarray(rng.standard_normal((64, 64)))} for _ in range(2))
  references = {1: to_host(old), 2: to_host(new)}
  target = jax.eval_shape(lambda: new)
  with Checkpoints(tmp_path / 'sound', every=1) as ckpt:
    ckpt.maybe_save(old, 1, {'at': 1})
    ckpt.maybe_save(new, 2, {'at': 2})
  used = {}
  for i, file in enumerate(checkpoint_files(tmp_path / 'sound' / '2')):
    copy = tmp_path / str(i)
    shutil.copytree(tmp_path / 'sound', copy)
    harm(copy / '2' / file)
    with Checkpoints(copy, every=1) as ckpt:
      state, step, metadata = ckpt.restore(target)
      # Some files only describe the others: without them the values may still be right.
      assert_same_bits(state, references[step])
      assert metadata == {'at': step}
      assert ckpt.steps() == ([1] if step == 1 else [1, 2])
    reported = any(f'{copy}/2 is damaged' in message for message in warned())
    assert reported == (step == 1)
    used[str(file)] = step
  assert used['metadata/metadata'] == 1
  assert used['state/manifest.ocdbt'] == 1
  data = [step for file, step in used.items() if '/d/' in file]
  assert data.count(1) >= 2  # The index and the values; the third is an index of the writer's own.


def test_a_damaged_step_can_be_saved_again(tmp_path, mesh):
  state = make_state(mesh)
  with Checkpoints(tmp_path, every=1) as ckpt:
    ckpt.maybe_save(state, 1, None)
    ckpt.maybe_save(state, 2, None)
    ckpt.wait()
    for again in range(2):
      shutil.rmtree(tmp_path / '2' / 'state')
      assert ckpt.restore(abstract(state, mesh)).step == 1, again
      assert (tmp_path / 'damaged_2').is_dir()
      assert ckpt.maybe_save(state, 2, None)
      assert ckpt.restore(abstract(state, mesh)).step == 2


def test_silently_changed_values_are_damage(tmp_path, mesh, warned, monkeypatch):
  state = make_state(mesh)
  with Checkpoints(tmp_path, every=1) as ckpt:
    ckpt.maybe_save(state, 1, None)
    changed = dict(state, step=state['step'] + 1)
    record = checkpoint._record
    monkeypatch.setattr(checkpoint, '_record', lambda _, m: record(checkpoint._by_path(state), m))
    ckpt.maybe_save(changed, 2, None)
    assert ckpt.restore(abstract(state, mesh)).step == 1
  assert any('step does not match its digest' in message for message in warned())


def test_all_damaged_is_an_error_and_nothing_is_moved(tmp_path, mesh):
  state = make_state(mesh)
  with Checkpoints(tmp_path, every=1) as ckpt:
    ckpt.maybe_save(state, 1, None)
    ckpt.maybe_save(state, 2, None)
    ckpt.wait()
    for step in '12':
      shutil.rmtree(tmp_path / step / 'state')
    with pytest.raises(ValueError, match=r'all checkpoints are damaged \(steps \[2, 1\]'):
      ckpt.restore(abstract(state, mesh))
    assert ckpt.steps() == [1, 2]


def test_too_little_memory_is_not_damage(tmp_path, mesh, monkeypatch):
  state = make_state(mesh)
  with Checkpoints(tmp_path, every=1) as ckpt:
    ckpt.maybe_save(state, 1, None)

    def fail(*_):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')

    monkeypatch.setattr(ckpt, '_read_leaves', fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE_EXHAUSTED'):
      ckpt.restore(abstract(state, mesh))


ENDLESS_SAVES = """
import sys
import jax, jax.numpy as jnp
from memjax.checkpoint import Checkpoints
ckpt = Checkpoints(sys.argv[1], every=1, keep=2)
for step in range(1, 10_000):
  ckpt.maybe_save({'x': jnp.full((512, 1024), step)}, step, {'at': step})
  print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_usable_checkpoint(tmp_path):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = {'x': jax.ShapeDtypeStruct((512, 1024), jnp.int32, sharding=sharding)}
  last = 0
  process = subprocess.Popen(
    [sys.executable, '-c', ENDLESS_SAVES, str(tmp_path)],
    stdout=subprocess.PIPE,
    env=dict(os.environ, JAX_PLATFORMS='cpu'),
    text=True,
  )
  for line in process.stdout:
    last = int(line)
    if last == 4:
      break
  time.sleep(0.013)  # Somewhere inside the write of the fourth.
  process.send_signal(signal.SIGKILL)
  process.wait()
  process.stdout.close()
  with Checkpoints(tmp_path, every=1) as ckpt:
    restored = ckpt.restore(target)
    assert restored.step >= last - 1  # The save under way when killed may be lost, nothing else.
    assert restored.metadata == {'at': restored.step}
    np.testing.assert_array_equal(restored.state['x'], restored.step)
    ckpt.maybe_save(restored.state, restored.step + 1, None)
  leftover = [p.name for p in tmp_path.iterdir() if not p.name.isdigit()]
  assert leftover == []


def test_no_file_is_a_pickle_and_the_record_is_plain_json(tmp_path, mesh):
  with Checkpoints(tmp_path, every=1) as ckpt:
    ckpt.maybe_save(make_state(mesh), 1, None)
  record = json.loads((tmp_path / '1' / 'metadata' / 'metadata').read_text())
  assert record['leaves']['params/head/kernel']['dtype'] == 'bfloat16'
  assert not any(p.suffix in ('.pkl', '.pickle') for p in tmp_path.rglob('*'))
