"""The log of a zeroth-order run, which is its checkpoint: a few numbers a step.

Shapes in this file: `K` steps, `n` directions, `G` groups.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from memjax.estimators.estimator import find, is_state
from memjax.estimators.noise import address, hash_bits
from memjax.naming import path_string


class Log(NamedTuple):
  """What each step did: row `k` is step `k`. Takes `4 K (n G + 2) + 8` bytes."""

  start: jax.Array  # u32[], fingerprint of the weights before the first step.
  count: jax.Array  # i32[], steps so far.
  slopes: jax.Array  # f32[K, n, G]; NaN for a step that was skipped.
  learning_rate: jax.Array  # f32[K].
  rows: jax.Array  # u32[K], fingerprint of each leaf's first row before the step.


class RecordState(NamedTuple):
  """State of `record`."""

  inner: Any
  log: Log


def record(
  inner: optax.GradientTransformation, learning_rate, steps: int
) -> optax.GradientTransformationExtraArgs:
  """Keeps a log of every step of an optimizer that begins with an estimator.

  From the starting weights and the log, `memjax.replay` makes the weights of any step, bit for bit,
  without a forward pass: 20,000 steps of a model of any size are 240 kB.

  Args:
    inner: The chain.
    learning_rate: Of the chain, a number or a schedule.
    steps: Steps that the log has room for.
  """
  inner = optax.with_extra_args_support(inner)
  rate = learning_rate if callable(learning_rate) else lambda count: learning_rate

  def init(params):
    state = inner.init(params)
    slopes = find(state).slopes
    log = Log(
      start=fingerprint(params),
      count=jnp.zeros((), jnp.int32),
      slopes=jnp.full((steps, *slopes.shape), jnp.nan, slopes.dtype),
      learning_rate=jnp.zeros(steps, slopes.dtype),
      rows=jnp.zeros(steps, jnp.uint32),
    )
    return RecordState(state, log)

  def update(updates, state, params=None, *, layer=None, measured=False, **extra_args):
    updates, after = inner.update(
      updates, state.inner, params, layer=layer, measured=measured, **extra_args
    )
    if layer is not None or measured:  # Written down already.
      return updates, state._replace(inner=after)
    found, log = find(after), state.log
    slopes = jnp.where(found.skips(), jnp.nan, found.slopes)
    # Of the update that this step makes, hence without it.
    finished = found.count - found.skipped - jnp.where(found.skips(), 0, 1)
    note = lambda column, value: column.at[found.count - 1].set(value, mode='drop')
    log = log._replace(
      count=found.count,
      slopes=note(log.slopes, slopes),
      learning_rate=note(log.learning_rate, rate(finished)),
      rows=note(log.rows, row_fingerprint(params)),
    )
    return updates, RecordState(after, log)

  return optax.GradientTransformationExtraArgs(init, update)


def observed(old: Any, new: Any) -> Any:
  """Returns an optax state with the measurements of `new` and everything else of `old`.

  >>> state = (optax.EmptyState(), optax.ScaleByScheduleState(jnp.int32(3)))
  >>> observed(state, optax.tree.zeros_like(state))[1].count.item()
  3
  """

  def take(before, after):
    if is_state(before):
      return after._replace(momentum=before.momentum)
    return after if isinstance(before, Log) else before

  return jax.tree.map(take, old, new, is_leaf=lambda x: is_state(x) or isinstance(x, Log))


def begun(state: Any, start: Callable[[], jax.Array]) -> Any:
  """Returns an optax state whose log, if it keeps one, has the fingerprint that `start` returns."""
  is_log = lambda x: isinstance(x, Log)
  begin = lambda x: x._replace(start=start()) if is_log(x) else x
  return jax.tree.map(begin, state, is_leaf=is_log)


def find_log(state: Any) -> Log:
  """Returns the log in an optax state.

  Raises:
    ValueError: if there is none.
  """
  is_log = lambda x: isinstance(x, Log)
  logs = [x for x in jax.tree.leaves(state, is_leaf=is_log) if is_log(x)]
  if not logs:
    raise ValueError('the optimizer keeps no log; make it with log_steps above zero')
  return logs[0]


def save_log(path, log: Log) -> None:
  """Writes a log to a `.npz` file, as long as it is."""
  count = min(int(log.count), len(log.learning_rate))
  cut = Log(*(x[:count] if np.ndim(x) else x for x in log))
  temporary = pathlib.Path(path).with_suffix('.tmp')
  with temporary.open('wb') as file:
    np.savez(file, **{name: np.asarray(x) for name, x in cut._asdict().items()})
  temporary.replace(path)  # So that a kill leaves the old file or the new one.


def load_log(path) -> Log:
  """Reads what `save_log` wrote."""
  with np.load(path) as file:
    return Log(*(jnp.asarray(file[name]) for name in Log._fields))


def fingerprint(params: Any) -> jax.Array:
  """Returns 32 bits, u32[], that depend on the bits of all parameters, their paths and places.

  Sends four bytes a leaf under a mesh. Weights of more than 32 bits are rounded to f32 first.
  """
  # Of what is kept: else a GPU holds weights that are made here in f32 too, for these sums.
  return _sum_over_leaves(_leaf_fingerprint, lax.optimization_barrier(params))


def layer_fingerprint(params: Any, index: jax.Array) -> jax.Array:
  """Returns 32 bits, u32[], of one layer `[1, ...]` of stacked leaves. Over all layers they add up
  to the `fingerprint` of the whole leaves.
  """
  return _sum_over_leaves(lambda key, leaf: _sum_of_hashes(key, leaf[0], index), params)


def row_fingerprint(params: Any) -> jax.Array:
  """Returns 32 bits, u32[], that depend on the bits of the first row of each leaf: few numbers that
  tell one run's weights from another's.
  """
  return _sum_over_leaves(lambda key, leaf: _sum_of_hashes(key, first_row(leaf), 0), params)


def first_row(leaf: jax.Array) -> jax.Array:
  """Returns the first `[n]` of a leaf `[..., n]`; a scalar as it is."""
  return leaf[(0,) * (leaf.ndim - 1)]


def _sum_over_leaves(of_leaf, params):
  total = jnp.zeros((), jnp.uint32)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    key = address(jax.random.key(0), 0, path_string(path))
    total += of_leaf(key, jnp.asarray(leaf))
  return total


def _leaf_fingerprint(key, leaf):
  """A stack layer by layer: a GPU would hold its hashed bits whole."""
  if leaf.ndim < 3:
    return _sum_of_hashes(key, leaf, 0)
  layer = lambda at: _sum_of_hashes(key, leaf[at], at)
  return jnp.sum(lax.map(layer, jnp.arange(leaf.shape[0], dtype=jnp.uint32)), dtype=jnp.uint32)


def _sum_of_hashes(key, leaf, place):
  """Of an array whose first number has the place `place`, times its size, in its leaf."""
  bits = lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
  place = jnp.full(leaf.shape, place, jnp.uint32)
  for axis, size in enumerate(leaf.shape):  # Without a reshape, which would move shards.
    index = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    place = place * np.uint32(size % 2**32) + index
  return jnp.sum(hash_bits(key, place, bits), dtype=jnp.uint32)
