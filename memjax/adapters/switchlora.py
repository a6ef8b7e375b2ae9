"""SwitchLoRA: vectors of the factors are exchanged a few at a time, all through training.

Shapes in this file: a matrix is `W[m, n]`, its factors `A[m, r]` and `B[r, n]`, whose vectors are
the columns of A and the rows of B; stacked leaves have an axis of layers in front. A pool has `c =
min(m, n)` candidates; at most `q` vectors of a factor are exchanged in one update.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.adapters import pools
from memjax.adapters import state as state_lib
from memjax.adapters.merge import fold_all
from memjax.adapters.noise import layer_keys
from memjax.naming import fold_in_path, path_string
from memjax.transforms.rounding import add_update
from memjax.weights.switched import Switched

POOLS = ('keys', 'device', 'host')
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
      vectors go back to their place with what they have learnt, as published. 'host' does the same
      in the host's memory, of which vectors visit the device one by one, `q` of each factor and
      layer an update. 'keys' keeps none: each candidate is drawn as it comes, and what a vector has
      learnt stays in W alone.
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
    dtype, everyone = jnp.dtype(self.dtype or shape.dtype), jnp.arange(min(m, n))
    first = min(m, n) - self.rank
    chosen_a = first + jnp.arange(self.rank)
    # Rotated by half, since exchanges of B begin there.
    chosen_b = first + (jnp.arange(self.rank) - self.rank // 2) % self.rank
    draw_a = lambda ids: self._draw(key, _A, ids, (m, n), dtype)
    draw_b = lambda ids: self._draw(key, _B, ids, (m, n), dtype)
    zeros = jnp.zeros(self.rank, jnp.int32)
    keep = lambda pool: pools.store(pool) if self.pool == 'host' else pool
    leaf = Switched(
      base=matrix,
      a=draw_a(chosen_a).T,
      b=draw_b(chosen_b),
      pool_a=keep(draw_a(everyone)) if self.pool != 'keys' else None,
      pool_b=keep(draw_b(everyone)) if self.pool != 'keys' else None,
      chosen_a=chosen_a,
      chosen_b=chosen_b,
      frozen_a=zeros,
      frozen_b=zeros,
      next_slots=jnp.array([0, self.rank // 2], jnp.int32),
      scale=self.scale,
    )
    base = add_update(matrix, -leaf.delta(), jax.random.fold_in(key, _ROUND))
    return dataclasses.replace(leaf, base=base)

  def due(self, step: jax.Array) -> jax.Array:
    """Whether an exchange is possible before the update that follows `step` finished ones."""
    return step >= 0

  def restart(self, state: dict, key: jax.Array, init: Callable) -> dict:
    """Returns the training state after the exchanges of this update.

    Args:
      state: Training state.
      key: Root key of new vectors, of how many there are, and of the rounding of W.
      init: Of the optimizer.
    """
    interval = self.interval_at(state['step'])
    where, sums = {}, {}

    def renew(path, leaf):
      if not isinstance(leaf, Switched) or self.rank == min(leaf.a.shape[-2], leaf.b.shape[-1]):
        return leaf
      path = path_string(path)
      leaf_key = fold_in_path(key, path)
      now = jax.random.fold_in(leaf_key, state['step'])
      leaf, sums[path] = self._exchanged(leaf, leaf_key, now, interval)
      where[f'{path}/a'] = (leaf.frozen_a == self.freeze)[..., None, :]
      where[f'{path}/b'] = (leaf.frozen_b == self.freeze)[..., :, None]
      return leaf

    def noise(path):
      at_step = jax.random.fold_in(fold_in_path(key, path), state['step'])
      return jax.random.fold_in(at_step, _ROUND)

    params = jax.tree.map_with_path(renew, state['params'], is_leaf=weights.is_weight)
    due = sum(jnp.sum(leaf.b != 0) for leaf in sums.values()) > 0
    bases = fold_all(sums, {path: noise(path) for path in sums}, due)

    def settle(path, leaf):
      path = path_string(path)
      return dataclasses.replace(leaf, base=bases[path]) if path in bases else leaf

    params = jax.tree.map_with_path(settle, params, is_leaf=weights.is_weight)
    opt = state_lib.restarted(state['opt'], state_lib.fresh(init, params), where)
    return {**state, 'params': params, 'opt': opt}

  def around(self, step: Callable) -> Callable:
    """Returns a training step that passes pools on without reading them."""

    def apart(state, batch):
      light = {**state, 'params': pools.without(state['params'])}
      new, metrics = step(light, batch)
      return {**new, 'params': pools.put_back(new['params'], state['params'])}, metrics

    return apart

  def place(self, shardings: Any) -> Any:
    """Returns shardings of adapted parameters with the pools where they are kept."""
    return pools.on_host(shardings) if self.pool == 'host' else shardings

  def _exchanged(self, leaf, key, now, interval):
    """A leaf with new vectors, and, as another that adapts its base, what they leave to W."""
    batch = leaf.chosen_a.shape[:-1]
    each = lambda function: jax.vmap(function) if batch else function
    keys, nows = (layer_keys(k, batch) for k in (key, now))
    light = dataclasses.replace(leaf, base=None, pool_a=None, pool_b=None)
    turns = each(lambda *layer: self._turns(*layer, interval))(light, nows)
    came = [
      self._candidates(kind, pool, turn.ids, leaf, keys, each)
      for kind, pool, turn in zip((_A, _B), (leaf.pool_a, leaf.pool_b), turns)
    ]
    new, left, u, v = each(self._exchange)(light, turns, came)
    if self.pool != 'keys':
      write = pools.write_host if self.pool == 'host' else each(pools.write)
      kept = [
        write(pool, turn.before, rows)
        for pool, turn, rows in zip((leaf.pool_a, leaf.pool_b), turns, left)
      ]
      new = dataclasses.replace(new, pool_a=kept[0], pool_b=kept[1])
    new = dataclasses.replace(new, base=leaf.base)
    return new, weights.Adapted(leaf.base, u, v, scale=leaf.scale)

  def _candidates(self, kind, pool, ids, leaf, keys, each):
    """Vectors of candidates `ids[..., q]`, drawn or from the pool."""
    if self.pool == 'host':
      return pools.read_host(pool, ids)
    if self.pool == 'device':
      return each(lambda pool, ids: pool[ids])(pool, ids)
    shape, dtype = (leaf.a.shape[-2], leaf.b.shape[-1]), (leaf.a, leaf.b)[kind].dtype
    draw = lambda ids, key: self._draw(jax.random.wrap_key_data(key), kind, ids, shape, dtype)
    return each(draw)(ids, keys)

  def _turns(self, leaf, now, interval):
    """Which slots of A and of B of one matrix are exchanged, and for which candidates."""
    m, n, rank = leaf.a.shape[0], leaf.b.shape[1], self.rank
    candidates = min(m, n)
    most = min(math.floor(rank / self.interval) + 1, candidates - rank)
    at_a, at_b = leaf.next_slots
    waiting = lambda frozen: jnp.sum(frozen > 1)  # After this update.
    room_b = (at_a - waiting(leaf.frozen_a) - at_b) % rank
    room_a = (at_b - waiting(leaf.frozen_b) - at_a) % rank
    now = jax.random.wrap_key_data(now)
    drawn = self._count(jax.random.fold_in(now, _COUNT), interval)
    count = jnp.minimum(jnp.minimum(drawn, most), jnp.minimum(room_a, room_b))
    around = None if self.pool == 'keys' else candidates
    return [
      _turn(chosen, at, count, most, around)
      for chosen, at in ((leaf.chosen_a, at_a), (leaf.chosen_b, at_b))
    ]

  def _exchange(self, leaf, turns, came):
    """One matrix's turn: the leaf, without its base and pools; the vectors of the slots before;
    and factors `f32[m, 2q], f32[2q, n]` of what W gains.
    """
    a, b = turns
    count = jnp.sum(a.active)
    left = [a.rows(leaf.a.T), b.rows(leaf.b)]
    u_a, v_a = a.difference(left[0], came[0]).T, a.rows(leaf.b).astype(jnp.float32)
    new_a = a.put(leaf.a.T, came[0]).T
    u_b = b.rows(new_a.T).T.astype(jnp.float32)
    v_b = b.difference(left[1], came[1])
    wait = lambda frozen, turn: turn.put(
      jnp.maximum(frozen - 1, 0), jnp.full(turn.slots.shape, self.freeze)
    )
    leaf = dataclasses.replace(
      leaf,
      a=new_a,
      b=b.put(leaf.b, came[1]),
      chosen_a=a.put(leaf.chosen_a, a.ids),
      chosen_b=b.put(leaf.chosen_b, b.ids),
      frozen_a=wait(leaf.frozen_a, b),
      frozen_b=wait(leaf.frozen_b, a),
      next_slots=(leaf.next_slots + count) % self.rank,
    )
    return leaf, left, jnp.concatenate([u_a, u_b], 1), jnp.concatenate([v_a, v_b], 0)

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


class _Turn(NamedTuple):
  """Up to q slots of a factor `[r, ...]` whose vectors are exchanged for others."""

  slots: jax.Array  # i32[q], in the order of the factor.
  active: jax.Array  # bool[q], the first ones; the others keep their vectors.
  before: jax.Array  # i32[q], candidates that were there.
  ids: jax.Array  # i32[q], those that come.

  def rows(self, x):
    """Rows of the slots."""
    return x[self.slots]

  def put(self, x, rows):
    """Writes rows into the active slots."""
    return x.at[jnp.where(self.active, self.slots, x.shape[0])].set(
      rows.astype(x.dtype), mode='drop'
    )

  def difference(self, old, new):
    """What the factor loses in each slot, f32."""
    active = self.active[:, None]
    return jnp.where(active, old.astype(jnp.float32) - new.astype(jnp.float32), 0)


def _turn(chosen, at, count, most, candidates) -> _Turn:
  """The next slots, and the candidates after the last that came; None of them is without end."""
  rank = chosen.shape[0]
  slots = (at + jnp.arange(most)) % rank
  ids = chosen[(at - 1) % rank] + 1 + jnp.arange(most)
  ids = ids if candidates is None else ids % candidates
  return _Turn(slots, jnp.arange(most) < count, chosen[slots], ids)
