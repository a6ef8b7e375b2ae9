"""SwitchLoRA: vectors of the factors are exchanged a few at a time, all through training.

Shapes in this file: a matrix is `W[m, n]`, its factors `A[m, r]` and `B[r, n]`, whose vectors are
the columns of A and the rows of B; stacked leaves have an axis of layers in front. A pool has `c =
min(m, n)` candidates; at most `q` vectors of a factor are exchanged in one update.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.adapters import state as state_lib
from memjax.adapters.merge import fold
from memjax.adapters.noise import layer_keys
from memjax.naming import fold_in_path, path_string
from memjax.transforms.rounding import add_update
from memjax.weights.switched import Switched

POOLS = ('keys', 'device')
_FACTOR = 0.3  # What is left of the frequency of switches after `descent` updates.
_A, _B, _COUNT, _ROUND = range(4)  # What a key is for.


@dataclasses.dataclass(frozen=True)
class SwitchLoRA:
  r"""`W + s A B` whose vectors are exchanged for others, `W + s A B` staying what it is.

  .. math::
    W \leftarrow W + s (a_i - a') b_i^T, \quad a_i \leftarrow a'

  In an update `r / interval` vectors of A and as many of B are exchanged on average, ever fewer as
  training goes on. The counterpart `b_i` of a new `a'` loses its optimizer state and stays as it
  is for `freeze` updates, while state of `a_i` passes on to `a'`. State is `2 r (m + n)` numbers a
  matrix with Adam, gradients half of that; W is changed in place, and in bf16 rounded
  stochastically each time. Use `vector_adam`, which counts updates of each vector.

  The switch comes before the gradients of its update, so that they are those of the new vectors;
  the official code switches between the two.

  Attributes:
    rank: r. Where it is the shorter side of a matrix, nothing is left to be exchanged.
    alpha: Numerator of the scale `alpha / rank`.
    targets: Regular expression searched in leaf paths; '' the layers' matrices.
    rest: Likewise, of what is trained in full; the default is everything else.
    interval: Updates in which each vector is exchanged once, at the beginning.
    descent: Updates after which exchanges are 0.3 as frequent, then 0.09, and so on; published runs
      take a tenth of all updates.
    freeze: Updates for which the counterpart of a new vector is frozen.
    pool: 'device' keeps the candidates beside the matrix, `c (m + n)` numbers, more than its own;
      vectors go back to their place with what they have learnt, as published. 'keys' keeps none:
      each candidate is drawn as it comes, and what a vector has learnt stays in W alone.
    init: 'spread' draws both factors so that either's updates move the product alike, and takes
      their product off W; 'lora' draws A as LoRA does, and B and its candidates are zero.
    dtype: Of the factors; '' is that of the matrix.

  References:
    Zhou et al., `SwitchLoRA <https://arxiv.org/abs/2406.06564>`_, 2024
  """

  rank: int
  alpha: float = 1.0
  targets: str = ''
  rest: str = '.*'
  interval: float = 40.0
  descent: int = 4000
  freeze: int = 5
  pool: str = 'keys'
  init: str = 'spread'
  dtype: str = ''

  def __post_init__(self):
    if self.pool not in POOLS:
      raise ValueError(f'pool is {self.pool!r}, not one of {", ".join(POOLS)}')
    if self.init not in ('spread', 'lora'):
      raise ValueError(f"init is {self.init!r}, not 'spread' or 'lora'")
    if self.freeze < 1 or self.interval < 2 * self.freeze:
      raise ValueError(
        f'interval is {self.interval} and freeze {self.freeze}: vectors are frozen for one update '
        'or more, and an interval is at least twice as long'
      )

  @property
  def scale(self) -> float:
    """What the product of the factors is multiplied by."""
    return self.alpha / self.rank

  def interval_at(self, step: jax.Array) -> jax.Array:
    """Returns the updates in which each vector is exchanged once, after `step` updates."""
    rate = _FACTOR ** ((jnp.asarray(step, jnp.float32) + 1) / self.descent)
    return self.interval / jnp.maximum(rate, 1e-8)

  def adapt(self, matrix: Any, key: jax.Array) -> Switched:
    """Returns the adapted leaf of a matrix `[m, n]`."""
    shape = weights.whole(matrix)
    m, n = shape.shape
    dtype, pool = jnp.dtype(self.dtype or shape.dtype), jnp.arange(min(m, n))
    first = min(m, n) - self.rank
    chosen_a = first + jnp.arange(self.rank)
    # Rotated by half, since exchanges of B begin there.
    chosen_b = first + (jnp.arange(self.rank) - self.rank // 2) % self.rank
    draw_a = lambda ids: self._draw(key, _A, ids, (m, n), dtype)
    draw_b = lambda ids: self._draw(key, _B, ids, (m, n), dtype)
    zeros = jnp.zeros(self.rank, jnp.int32)
    leaf = Switched(
      base=matrix,
      a=draw_a(chosen_a).T,
      b=draw_b(chosen_b),
      pool_a=draw_a(pool) if self.pool == 'device' else None,
      pool_b=draw_b(pool) if self.pool == 'device' else None,
      chosen_a=chosen_a,
      chosen_b=chosen_b,
      frozen_a=zeros,
      frozen_b=zeros,
      next_slots=jnp.array([0, self.rank // 2], jnp.int32),
      scale=self.scale,
    )
    base = add_update(matrix, -leaf.delta(), jax.random.fold_in(key, _ROUND))
    return dataclasses.replace(leaf, base=base)

  def restart(self, state: dict, key: jax.Array, init: Callable) -> dict:
    """Returns the training state after the exchanges of this update.

    Args:
      state: Training state.
      key: Root key of new vectors, of how many there are, and of the rounding of W.
      init: Of the optimizer.
    """
    interval, where = self.interval_at(state['step']), {}

    def renew(path, leaf):
      if not isinstance(leaf, Switched) or self.rank == min(leaf.a.shape[-2], leaf.b.shape[-1]):
        return leaf
      path = path_string(path)
      leaf_key = fold_in_path(key, path)
      now = jax.random.fold_in(leaf_key, state['step'])
      leaf, taken = self._exchanged(leaf, leaf_key, now, interval)
      base = fold(taken, jax.random.fold_in(now, _ROUND), jnp.any(taken.b != 0))
      where[f'{path}/a'] = (leaf.frozen_a == self.freeze)[..., None, :]
      where[f'{path}/b'] = (leaf.frozen_b == self.freeze)[..., :, None]
      return dataclasses.replace(leaf, base=base)

    params = jax.tree.map_with_path(renew, state['params'], is_leaf=weights.is_weight)
    opt = state_lib.restarted(state['opt'], state_lib.fresh(init, params), where)
    return {**state, 'params': params, 'opt': opt}

  def _exchanged(self, leaf, key, now, interval):
    """A leaf with new vectors, and, as another that adapts its base, what they leave to W."""
    batch = leaf.chosen_a.shape[:-1]
    keys = [layer_keys(each, batch) for each in (key, now)]
    one = lambda leaf, key, now: self._exchange(leaf, *_typed(key, now), interval)
    light = dataclasses.replace(leaf, base=None)
    new, u, v = (jax.vmap(one) if batch else one)(light, *keys)
    return new, weights.Adapted(leaf.base, u, v, scale=leaf.scale)

  def _exchange(self, leaf, key, now, interval):
    """One matrix's turn: the leaf without its base, and factors `f32[m, 2q], f32[2q, n]`."""
    m, n, rank = leaf.a.shape[0], leaf.b.shape[1], self.rank
    free = min(m, n) - rank
    most = min(math.floor(rank / self.interval) + 1, free)
    leaf = dataclasses.replace(
      leaf,
      frozen_a=jnp.maximum(leaf.frozen_a - 1, 0),
      frozen_b=jnp.maximum(leaf.frozen_b - 1, 0),
    )
    at_a, at_b = leaf.next_slots
    room_b = (at_a - jnp.sum(leaf.frozen_a > 0) - at_b) % rank
    room_a = (at_b - jnp.sum(leaf.frozen_b > 0) - at_a) % rank
    drawn = self._count(jax.random.fold_in(now, _COUNT), interval)
    count = jnp.minimum(jnp.minimum(drawn, most), jnp.minimum(room_a, room_b))
    fresh = lambda kind, ids, dtype: self._draw(key, kind, ids, (m, n), dtype)

    turn = _turn(leaf.chosen_a, at_a, count, most, leaf.pool_a)
    old, new, pool_a = turn.trade(leaf.a.T, leaf.pool_a, lambda ids, d: fresh(_A, ids, d))
    u_a, v_a = turn.difference(old, new).T, turn.rows(leaf.b)
    leaf = dataclasses.replace(
      leaf,
      a=turn.put(leaf.a.T, new).T,
      pool_a=pool_a,
      chosen_a=turn.put(leaf.chosen_a, turn.ids),
      frozen_b=turn.put(leaf.frozen_b, jnp.full(most, self.freeze)),
    )
    turn = _turn(leaf.chosen_b, at_b, count, most, leaf.pool_b)
    old, new, pool_b = turn.trade(leaf.b, leaf.pool_b, lambda ids, d: fresh(_B, ids, d))
    u_b, v_b = turn.rows(leaf.a.T).T, turn.difference(old, new)
    leaf = dataclasses.replace(
      leaf,
      b=turn.put(leaf.b, new),
      pool_b=pool_b,
      chosen_b=turn.put(leaf.chosen_b, turn.ids),
      frozen_a=turn.put(leaf.frozen_a, jnp.full(most, self.freeze)),
      next_slots=(leaf.next_slots + count) % rank,
    )
    return leaf, jnp.concatenate([u_a, u_b], 1), jnp.concatenate([v_a, v_b], 0)

  def _count(self, key, interval):
    """How many vectors to exchange: `r / interval` on average."""
    expected = self.rank / interval
    more = jax.random.uniform(key) < expected - jnp.floor(expected)
    return (jnp.floor(expected) + more).astype(jnp.int32)

  def _draw(self, key, kind, ids, shape, dtype):
    """Candidates `[ids, m]` or `[ids, n]`, each from its own key."""
    bound = math.sqrt(3) * self._std(kind, *shape)
    length = shape[kind]
    draw = lambda i: jax.random.uniform(
      jax.random.fold_in(jax.random.fold_in(key, kind), i), (length,), jnp.float32, -bound, bound
    )
    return jax.vmap(draw)(ids).astype(dtype)

  def _std(self, kind, m, n):
    """Standard deviation of the entries of A or of B."""
    gain = math.sqrt(1 / 3)
    if self.init == 'lora':
      return gain / math.sqrt(m) if kind == _A else 0.0
    ratio = math.sqrt(n) * self.rank / m**1.5 if kind == _A else self.rank / math.sqrt(m * n)
    return ratio**0.25 * math.sqrt(gain)


@dataclasses.dataclass(frozen=True)
class _Turn:
  """Up to q slots of a factor `[r, ...]` whose vectors are exchanged for others."""

  slots: jax.Array  # i32[q], in the order of the factor.
  active: jax.Array  # bool[q], the first ones; the others keep their vectors.
  before: jax.Array  # i32[q], candidates that were there.
  ids: jax.Array  # i32[q], those that come.

  def rows(self, x):
    """Rows of the slots, in f32."""
    return x[self.slots].astype(jnp.float32)

  def put(self, x, rows):
    """Writes rows into the active slots."""
    return x.at[jnp.where(self.active, self.slots, x.shape[0])].set(
      rows.astype(x.dtype), mode='drop'
    )

  def difference(self, old, new):
    """What the factor loses in each slot, f32."""
    active = self.active[:, None]
    return jnp.where(active, old.astype(jnp.float32) - new.astype(jnp.float32), 0)

  def trade(self, factor, pool, draw):
    """Vectors that leave and that come, and the pool after the former went back to it."""
    old = factor[self.slots]
    if pool is None:
      return old, draw(self.ids, factor.dtype), None
    back = jnp.where(self.active, self.before, pool.shape[0])
    return old, pool[self.ids], pool.at[back].set(old, mode='drop')


def _turn(chosen, at, count, most, pool) -> _Turn:
  """The next slots, and the candidates that follow the last one that came."""
  rank = chosen.shape[0]
  slots = (at + jnp.arange(most)) % rank
  ids = chosen[(at - 1) % rank] + 1 + jnp.arange(most)
  ids = ids if pool is None else ids % pool.shape[0]
  return _Turn(slots, jnp.arange(most) < count, chosen[slots], ids)


def _typed(*keys):
  return [jax.random.wrap_key_data(key) for key in keys]
