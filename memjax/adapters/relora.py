"""ReLoRA: low-rank updates that join the matrix one after the other, so that their sum is not low.

Shapes in this file: a matrix is `W[m, n]`, its factors `A[m, r]` and `B[r, n]`; stacked leaves have
an axis of layers in front.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax import weights
from memjax.adapters import state as state_lib
from memjax.adapters.lora import LoRA, draw_a
from memjax.adapters.merge import renewed
from memjax.adapters.noise import layer_keys
from memjax.naming import fold_in_path, path_string

PRUNES = ('magnitude', 'random', 'zero')


@dataclasses.dataclass(frozen=True)
class ReLoRA(LoRA):
  r"""LoRA that restarts: `W <- W + s A B`, A drawn anew, B zero, most of the moments forgotten.

  After k restarts W has moved by a matrix of rank up to `(k + 1) r`. In place of `2 m n` moments
  there are `2 r (m + n)`; W itself is changed at restarts alone, in place, and rounded
  stochastically where it has 16 bits or fewer. Go on with `memjax.schedules.jagged` and the same
  `restart_every`: old moments would push new factors the old way, and small first updates hide what
  is left of them.

  The published runs begin with thousands of updates of all weights, whose Adam needs the memory
  that is saved later. Here that is a run of its own: train without an adapter, and attach to what
  it leaves. So no device ever holds both, and the second run fits where the first did not; the
  schedule's `adjust_step` says how long the first was.

  Attributes:
    every: Updates between restarts.
    prune: What is forgotten of the factors' moments: all but the largest ('magnitude', by the first
      moment), all but a random part ('random'), or all ('zero', which starts counts of vectors and
      whatever else an optimizer has for a factor anew).
    ratio: Fraction of the numbers that is forgotten.
    apart: Draws, or chooses, for each moment on its own, as the official code does: a first moment
      may then stay whose second is gone, and makes an update far too large.
    offset: Updates after a multiple of `every` at which to restart. The official code waits for 1,
      the update whose learning rate is zero.
    dead_start: Begins with A zero too, as the official training script does: no gradient reaches
      either factor before the first restart.

  References:
    Lialin et al., `ReLoRA: High-Rank Training Through Low-Rank Updates
    <https://arxiv.org/abs/2307.05695>`_, 2023
  """

  every: int = 5000
  prune: str = 'magnitude'
  ratio: float = 0.99
  apart: bool = False
  offset: int = 0
  dead_start: bool = False
  rest: str = '.*'

  def __post_init__(self):
    super().__post_init__()
    if self.prune not in PRUNES:
      raise ValueError(f'prune is {self.prune!r}, not one of {", ".join(PRUNES)}')
    if not 0 <= self.ratio <= 1:
      raise ValueError(f'ratio is {self.ratio}, not a fraction')
    if not 0 <= self.offset < self.every:
      raise ValueError(f'offset {self.offset} is not in [0, every), every being {self.every}')

  def adapt(self, matrix: Any, key: jax.Array) -> weights.Restarted:
    """Returns the adapted leaf of a matrix `[m, n]`."""
    leaf = weights.Restarted(**vars(super().adapt(matrix, key)))
    return dataclasses.replace(leaf, a=jnp.zeros_like(leaf.a)) if self.dead_start else leaf

  def due(self, step: jax.Array) -> jax.Array:
    """Whether to restart before the update that follows `step` finished ones."""
    return (step >= self.every) & (step % self.every == self.offset)

  def restart(self, state: dict, key: jax.Array, init: Callable) -> dict:
    """Returns the training state, restarted if that is due.

    Args:
      state: Training state.
      key: Root key of new factors, of random pruning and of the rounding of W.
      init: Of the optimizer.
    """
    due = self.due(state['step'])
    key = jax.random.fold_in(key, state['step'])
    is_own = lambda leaf: isinstance(leaf, weights.Adapted)
    named = jax.tree.leaves_with_path(state['params'], is_leaf=weights.is_weight)
    own = {path_string(path): leaf for path, leaf in named if is_own(leaf)}
    shapes = {
      f'{path}/{part}': getattr(leaf, part).shape for path, leaf in own.items() for part in 'ab'
    }

    own = renewed(own, self._renewed, key, due)
    put = lambda path, leaf: own.get(path_string(path), leaf)
    params = jax.tree.map_with_path(put, state['params'], is_leaf=weights.is_weight)
    if self.prune == 'zero':
      where = dict.fromkeys(shapes, due)
      opt = state_lib.restarted(state['opt'], state_lib.fresh(init, params), where)
    else:
      prune = lambda owner, moments: self._pruned(fold_in_path(key, f'prune {owner}'), moments)
      opt = state_lib.pruned(state['opt'], prune, shapes, due)
    return {**state, 'params': params, 'opt': opt}

  def _renewed(self, leaf, key):
    return dataclasses.replace(leaf, a=self._redrawn(leaf.a, key), b=jnp.zeros_like(leaf.b))

  def _redrawn(self, a, key):
    *batch, m, rank = a.shape
    keys = jax.random.wrap_key_data(layer_keys(key, tuple(batch)))
    draw = lambda key: draw_a(key, m, rank, self.init).astype(a.dtype)
    return jax.vmap(draw)(keys) if batch else draw(keys)

  def _pruned(self, key, moments: dict) -> dict:
    """The moments of one leaf, of which few stay; by default the same of each."""
    kept, out = None, {}
    for path, x in moments.items():
      if kept is None or self.apart:
        kept = self._kept(fold_in_path(key, path) if self.apart else key, x)
      out[path] = jnp.where(kept, x, jnp.zeros_like(x))
    return out

  def _kept(self, key, x):
    if self.prune == 'random':
      return jax.random.uniform(key, x.shape) > self.ratio
    size = jnp.abs(x.astype(jnp.float32))
    return size > jnp.quantile(size, self.ratio, axis=(-2, -1), keepdims=True)


class ReLoRAState(NamedTuple):
  """State of `relora`."""

  count: jax.Array  # i32[], updates seen so far.
  inner: optax.OptState  # Of the wrapped transform, on what is trained.


def relora(
  inner: optax.GradientTransformation, spec: ReLoRA, key: jax.Array
) -> optax.GradientTransformation:
  """ReLoRA for a loop of one's own: updates of adapted parameters, restarts among them.

  At a restart the update of W is `s A B`, and those of A and B lead to another draw and to zero;
  then the moments are pruned. An update of W is an array of its size, zero elsewhere: what trains a
  large model is `memjax.adapters.over_time`, which changes W in place, by the same numbers.
  With dropout, each update moves the keys of the masks too; keys are integers, so differentiate
  with respect to `memjax.adapters.trainable(params)`.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from memjax import adapters, weights
    >>> spec = adapters.ReLoRA(rank=1, every=2, prune='zero')
    >>> params = adapters.attach({'w': jnp.zeros((4, 4))}, spec, jax.random.key(0))
    >>> optimizer = adapters.relora(optax.adam(0.1), spec, jax.random.key(1))
    >>> loss = lambda params: jnp.sum((weights.dot(jnp.eye(4), params['w']) - jnp.eye(4)) ** 2)
    >>> state, ranks = optimizer.init(params), []
    >>> for _ in range(7):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   ranks.append(int(jnp.linalg.matrix_rank(weights.materialize(params['w']), rtol=1e-4)))
    >>> ranks[0], ranks[-1] > 2
    (1, True)

  Args:
    inner: Transform of what is trained, learning rate included.
    spec: With which the parameters were adapted.
    key: Root key of new factors, of random pruning and of dropout.

  Returns:
    A transform with state `ReLoRAState`, of adapted parameters, which it reads. Gradients may be of
    all of them, or of `memjax.adapters.trainable(params)`.
  """

  def init(params):
    return ReLoRAState(jnp.zeros((), jnp.int32), state_lib.fresh(inner.init, params))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('relora changes the matrices themselves: give update() the parameters')
    trained = weights.trained(params)
    steps, opt = inner.update(weights.trained(updates), state.inner, trained)
    moved = weights.replaced(params, optax.apply_updates(trained, steps))
    count = optax.safe_increment(state.count)
    new = spec.restart({'step': count, 'params': moved, 'opt': opt}, key, inner.init)
    new = spec.advance(new, key)
    difference = jax.tree.map(lambda new, old: new - old, new['params'], params)
    return difference, ReLoRAState(count, new['opt'])

  return optax.GradientTransformation(init, update)
