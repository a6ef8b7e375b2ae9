"""Checkpoints of the training state: asynchronous, atomic, checked when they are read.

A checkpoint is the directory `<directory>/<step>`, written by orbax, with two items: `state`, the
arrays as a nested dict, and `metadata`, a JSON record. The record holds the caller's own metadata
and, for each leaf, its shape, its dtype and a digest: 32 bits computed on the device that holds the
leaf. `step` counts finished updates.

The digest tells a damaged checkpoint from a sound one when the damage is silent (a flipped bit in
uncompressed data reads without any error). It is a sum over elements, in wrap-around integers,
which any mesh adds up to the same bits; so a checkpoint written on eight devices is verified on
one.
"""

import contextlib
import json
import uuid
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax import lax

from memjax.naming import path_string


class Restored(NamedTuple):
  """What `Checkpoints.restore` found."""

  state: Any  # Pytree of the abstract state's structure; committed arrays with its shardings.
  step: int  # Finished updates.
  metadata: Any  # As given to `maybe_save`.


class Checkpoints:
  """Saves and restores a training state in a directory; a context manager.

  Holds no copy of the state on the device. `maybe_save` blocks for the copy from device to host and
  a few bytes of digests; files are written by a background thread into a temporary directory and
  renamed when complete, so that a process killed at any moment leaves the checkpoint before it
  usable.

  In a multi-process run every process makes the same calls; process 0 writes the metadata.

  Args:
    directory: Where checkpoints live; created if missing. A local path, or one that `etils.epath`
      knows (`gs://...`).
    every: Updates between checkpoints.
    keep: How many of the newest checkpoints to keep.
    keep_every: Checkpoints at multiples of this many updates are kept for good; `None` for no such
      rule.

  Raises:
    ValueError: when the directory cannot be written, or an interval is not positive.
  """

  def __init__(self, directory, *, every, keep=2, keep_every=None):
    for name, value in (('every', every), ('keep', keep), ('keep_every', keep_every)):
      if value is not None and value < 1:
        raise ValueError(f'{name} is {value}; it must be at least 1')
    check_writable(directory)
    import orbax.checkpoint as ocp  # Takes a second to import, so only who uses it pays.

    self._ocp = ocp
    self._every = every
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      keep_period=keep_every,
      cleanup_tmp_directories=True,
      lightweight_initialize=True,  # Reads no files yet: a damaged one must not stop us here.
    )
    self._manager = ocp.CheckpointManager(_absolute(directory), options=options)
    # Else orbax asks too at every save, with its own numbers, and the answer is lost between us.
    self._manager.reached_preemption = lambda step: False

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()

  def steps(self):
    """Steps of the complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def maybe_save(self, state, step, metadata, force=False):
    """Starts to save `state` if `step` is a multiple of `every`, or at once with `force`.

    The state may be donated as soon as this returns.

    Args:
      state: Pytree of `jax.Array`s.
      step: Finished updates.
      metadata: Anything `json.dumps` takes, such as the position in the data; from process 0 where
        there are several.
      force: Save whatever `every` says, as at the end of a run or before preemption.

    Returns:
      Whether a save was started; `False` also when this step is saved already.

    Raises:
      ValueError: if `metadata` is not JSON.
      Exception: whatever stopped an earlier save in the background, such as a full disk.
    """
    if not (force or step % self._every == 0) or step in self.steps():
      return False
    leaves = _by_path(state)
    record = _record(leaves, metadata)
    args = self._ocp.args
    return self._manager.save(
      step,
      args=args.Composite(state=args.StandardSave(_nest(leaves)), metadata=args.JsonSave(record)),
      force=True,
    )

  def restore(self, abstract_state):
    """Restores the newest undamaged checkpoint onto the shardings of `abstract_state`, on any mesh.

    The arrays are the device's own, as after a fresh start: a step may donate them. A damaged
    checkpoint is reported and moved aside, to `damaged_<step>`, once an earlier one has proved
    sound. Device memory: the state itself.

    Args:
      abstract_state: Pytree of `jax.ShapeDtypeStruct`s with shardings (or of arrays).

    Returns:
      A `Restored`, or `None` if there are no checkpoints.

    Raises:
      ValueError: if the newest sound checkpoint is of another model or optimizer, naming the first
        leaf that differs; or if every checkpoint is damaged.
    """
    self.wait()
    abstract = {path: _with_sharding(leaf) for path, leaf in _by_path(abstract_state).items()}
    damaged = []
    for step in reversed(self.steps()):
      leaves = None  # Frees what a damaged checkpoint left, before the next is read.
      record, damage = _attempt(self._read_record, step)
      if not damage:
        _check_same_leaves(self._path(step), record['leaves'], abstract)
        leaves, damage = _attempt(self._read_leaves, step, abstract)
      if not damage:
        leaves = {path: _own(leaf) for path, leaf in leaves.items()}
        damage = _differing_digest(record['leaves'], leaves)
      if not damage:
        self._move_aside(damaged)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves.values())
        return Restored(state, step, record['metadata'])
      logging.warning('checkpoint %s is damaged: %s', self._path(step), damage)
      damaged.append(step)
    if damaged:
      raise ValueError(
        f'{self._manager.directory}: all checkpoints are damaged (steps {damaged}; the log says '
        'why); remove them or choose another work directory to start afresh'
      )
    return None

  def wait(self):
    """Waits until a save under way is complete.

    Raises:
      Exception: whatever stopped that save.
    """
    self._manager.wait_until_finished()

  def close(self):
    """Waits for a save under way and frees the background threads."""
    self._manager.close()

  def _path(self, step):
    return epath.Path(self._manager.directory) / str(step)

  # The manager's own `restore` ends in a barrier, which a process that fails to read never reaches,
  # and the others wait for. These two read without one; `_attempt` then compares notes.

  def _read_record(self, step):
    return _read_record(self._path(step))

  def _read_leaves(self, step, abstract):
    target = self._ocp.args.StandardRestore(_nest(abstract))
    with contextlib.closing(self._ocp.StandardCheckpointHandler()) as handler:
      found = _by_path(handler.restore(self._path(step) / 'state', args=target))
    return {path: found[path] for path in abstract}

  def _move_aside(self, steps):
    """Renames damaged checkpoints: their steps can be saved again, and the evidence stays."""
    for step in steps:
      aside = self._path(step).parent / f'damaged_{step}'
      if jax.process_index() == 0:
        if aside.exists():
          aside.rmtree()
        self._path(step).rename(aside)
      logging.warning('moved the damaged checkpoint to %s; remove it when you like', aside)
    if steps:
      _all_processes(True)  # No process may list the directory before the renames are done.
      self._manager.reload()


def read_record(folder):
  """Returns the JSON record of one checkpoint, `<directory>/<step>`: the caller's `metadata`, and
  `leaves`.

  Files alone are read: no backend begins, nor do processes compare notes.

  Raises:
    ValueError: when it is damaged.
  """
  try:
    return _read_record(epath.Path(folder))
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(f'the checkpoint {folder} is damaged ({error}); name another') from error


def read_part(folder, described, abstract):
  """Returns a part of the state of one checkpoint, and reads no other; leaves files as they are.

  Args:
    folder: The checkpoint, `<directory>/<step>`.
    described: `leaves` of its record.
    abstract: Pytree of `jax.ShapeDtypeStruct`s with shardings, whose paths are those of the state.

  Raises:
    ValueError: when the checkpoint is damaged.
  """
  import orbax.checkpoint as ocp

  leaves = _by_path(abstract)

  def read():
    nested = _nest(leaves)
    onto = ocp.checkpoint_utils.construct_restore_args(nested)
    target = ocp.args.PyTreeRestore(nested, restore_args=onto, partial_restore=True)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
      found = _by_path(handler.restore(_absolute(folder) / 'state', args=target))
    return {path: found[path] for path in leaves}

  found, damage = _attempt(read)
  if not damage:
    found = {path: _own(leaf) for path, leaf in found.items()}
    damage = _differing_digest(described, found)
  if damage:
    raise ValueError(f'the checkpoint {folder} is damaged: {damage}; name another')
  return jax.tree.unflatten(jax.tree.structure(abstract), found.values())


def check_writable(directory):
  """Creates `directory` if it is missing and proves that a file can be written in it.

  Really writes one, because permission bits do not tell: root ignores them, and a read-only file
  system has them set.

  Raises:
    ValueError: naming the directory and what the system said.
  """
  directory = _absolute(directory)
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f'.writable_{uuid.uuid4().hex}'
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    raise ValueError(
      f'{directory} cannot be written ({error.strerror or error}); choose another work directory'
    ) from error


def digest(leaf, offset=0):
  """A 32-bit digest of an array that depends on its bits and their positions, on no mesh or
  sharding.

  `sum_i mix(bits_i ^ i * 0x9E3779B9) mod 2^32`, with `i` the row-major index and `mix` the
  finaliser of MurmurHash3: a bijection, so that a change within a single word always shows, and any
  other goes unseen with probability 2^-32. Communicates 4 bytes under `jit` over a mesh.

  Args:
    leaf: Real array of up to 64 bits an element, any shape.
    offset: u32[] or int, row-major index of the first element within a larger array.

  Returns:
    u32[].

  >>> int(digest(jnp.arange(6.0))) == int(digest(jnp.arange(3.0)) + digest(jnp.arange(3.0, 6), 3))
  True
  """
  words = _words(leaf)
  index = jnp.full(words.shape, offset, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):
    index += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  mixed = words ^ (index * np.uint32(0x9E3779B9))
  mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _words(leaf):
  """The bits of an array as u32; 64-bit elements become two words on a new last axis."""
  if leaf.dtype == jnp.bool_:
    return leaf.astype(jnp.uint32)
  info = jnp.iinfo if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo
  bits = min(info(leaf.dtype).bits, 32)
  return lax.bitcast_convert_type(leaf, f'uint{bits}').astype(jnp.uint32)


@jax.jit
def _digest_all(leaves):
  return [digest(leaf) for leaf in leaves]


@jax.jit
def _digest_by_slices(leaf):
  """`digest` of a leaf in host memory, fetching one slice `[i]` at a time."""
  size = jax.eval_shape(_words, leaf).size // leaf.shape[0]

  def body(i, total):
    part = lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    part = jax.device_put(part, jax.memory.Space.Device)
    return total + digest(part, i.astype(jnp.uint32) * np.uint32(size % 2**32))

  return lax.fori_loop(0, leaf.shape[0], body, np.uint32(0))


def _digests(leaves):
  """Digest of each leaf, as `{path: int}`.

  One program for all leaves on the device: as many as there are leaves, each with an all-reduce and
  all under way at once, deadlock between processes on CPU.
  """
  on_host = [
    path
    for path, leaf in leaves.items()
    if leaf.sharding.memory_kind == 'pinned_host' and leaf.ndim > 0
  ]
  on_device = [path for path in leaves if path not in on_host]
  digests = dict(zip(on_device, _digest_all([leaves[path] for path in on_device])))
  for path in on_host:
    digests[path] = _digest_by_slices(leaves[path])
  return {path: int(value) for path, value in jax.device_get(digests).items()}


def _read_record(path):
  record = json.loads((path / 'metadata' / 'metadata').read_text())
  if record['crc32'] != _crc32(record['metadata'], record['leaves']):
    raise ValueError('metadata does not match its checksum')
  return record


def _record(leaves, metadata):
  """The JSON item of a checkpoint."""
  try:
    metadata = json.loads(json.dumps(metadata))  # As it will be read: tuples become lists.
  except TypeError as error:
    raise ValueError(f'metadata must be JSON: {error}') from error
  digests = _digests(leaves)
  described = {
    path: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype), 'digest': digests[path]}
    for path, leaf in leaves.items()
  }
  return {'metadata': metadata, 'leaves': described, 'crc32': _crc32(metadata, described)}


def _crc32(metadata, described):
  return zlib.crc32(json.dumps([metadata, described], sort_keys=True).encode())


def _check_same_leaves(directory, saved, abstract):
  """Raises if the checkpoint's leaves, by path, are not those of the abstract state."""
  wanted = {
    path: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)} for path, leaf in abstract.items()
  }
  for path in [*wanted, *(path for path in saved if path not in wanted)]:
    here, there = _describe(wanted.get(path)), _describe(saved.get(path))
    if here != there:
      raise ValueError(
        f'{path}: this run has {here}, the checkpoint {directory} has {there}; resume with the '
        'model and optimizer that wrote it, or choose another work directory'
      )


def _describe(leaf):
  return 'no such leaf' if leaf is None else f'{leaf["dtype"]}{leaf["shape"]}'


def _differing_digest(saved, leaves):
  """The first leaf, in words, whose values are not those saved; `None` if all agree."""
  for path, value in _digests(leaves).items():
    if value != saved[path]['digest']:
      return f'{path} does not match its digest'
  return None


def _attempt(read, *args):
  """Returns `(result, None)`, or `(None, reason)` if some process finds the files damaged."""
  result, reason = None, None
  try:
    result = read(*args)
  except (jax.errors.JaxRuntimeError, MemoryError):
    raise  # The device's trouble, such as too little memory, says nothing about the files.
  except Exception as error:  # orbax and tensorstore raise many types for missing and torn files.
    while error.__cause__:
      error = error.__cause__  # The file's own trouble is at the bottom.
    first_line = str(error).split(' [tensorstore_spec')[0].partition('\n')[0]
    reason = f'{type(error).__name__}: {first_line}'
  if not _all_processes(reason is None):
    return None, reason or 'another process could not read it'
  return result, None


def _all_processes(ok):
  """Whether `ok` holds on every process; waits for them."""
  if jax.process_count() == 1:
    return ok
  from jax.experimental import multihost_utils

  return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _own(leaf):
  """The same array in a buffer that XLA owns.

  On CPU orbax hands out arrays over numpy's memory, which XLA cannot reuse when a step donates
  them: the first step would silently hold the state twice. A donating copy costs nothing where the
  buffer is the device's own already.
  """
  return jax.jit(jnp.copy, donate_argnums=0, out_shardings=leaf.sharding)(leaf)


def _with_sharding(leaf):
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _by_path(tree):
  """Leaves by slash-joined path, in the order of `jax.tree.leaves`."""
  leaves = {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  if len(leaves) != len(jax.tree.leaves(tree)):
    raise ValueError('two leaves of the state have the same path; rename keys that contain "/"')
  return leaves


def _nest(leaves):
  """Nested dicts from paths: what orbax stores, whatever containers the state is made of."""
  nested = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    node = nested
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return nested


def _absolute(directory):
  """An absolute path, which orbax requires; `gs://` paths are that already."""
  directory = epath.Path(directory)
  return directory if '://' in str(directory) else directory.expanduser().absolute()
