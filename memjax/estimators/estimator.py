"""From values of a function to an estimate of its gradient: what all estimators share.

Shapes in this file: `n` directions a step, `G` groups of parameters perturbed in turn (one, unless
blockwise), `d` parameters, `L` layers of stacked leaves `[L, ...]`. A slope is what multiplies a
direction in the estimate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax import weights
from memjax.estimators.leaves import Leaf, Leaves, describe, group_scales
from memjax.naming import nearest

MEASURES = ('two_sided', 'one_sided', 'forward')
FORMS = ('arrays', 'weights')
FORGET = 0.99  # Of the running mean and square of slopes, which diagnostics read.


class EstimatorState(NamedTuple):
  """State of an estimator: scalars, `n G` slopes, and what its directions keep."""

  count: jax.Array  # i32[], estimates so far, skipped ones included; the number of the next.
  skipped: jax.Array  # i32[], those whose values were not finite.
  last: jax.Array  # i32[], number of the last that was not skipped; -1 before the first.
  previous: jax.Array  # i32[], the same when the last estimate began.
  value: jax.Array  # f32[], mean of the values of the last estimate that was not skipped.
  slopes: jax.Array  # f32[n, G], of the last estimate; zeros if it was skipped.
  moments: jax.Array  # f32[2], running mean of the slopes and of their squares.
  difference: jax.Array  # f32[], root mean square of differences of its values; 0 if skipped.
  # None where W is 0: an array without numbers is one that no checkpoint can hold.
  history: Any  # f32[W, n, G], slopes of the last W that were not skipped, the newest last.
  numbers: Any  # i32[W], their numbers.
  basis: Any  # What directions are made from; changes when values are measured.
  momentum: Any  # What estimates add up in; changes when an estimate is handed on.

  def skips(self) -> jax.Array:
    """bool[], whether the last estimate was skipped."""
    return self.last != self.count - 1


class Directions(NamedTuple):
  """How parameters are perturbed, and what an estimate along that direction is.

  A basis is a dict of lists in the order of the leaves, a momentum such a list, None where a leaf
  keeps nothing; a leaf is given its own parts. In the state they are trees like the parameters,
  from which their sharding and their layers are read.
  """

  # Leaves -> (basis, momentum).
  init: Callable[[Leaves], tuple[dict[str, list], list]]
  # (leaves, basis, number of the estimate) -> basis.
  refresh: Callable[[Leaves, dict[str, list], jax.Array], dict[str, list]]
  # (leaf, value, number of the draw, scale f32[] or f32[L], basis) -> a weight.
  perturb: Callable[[Leaf, Any, jax.Array, jax.Array, Any], Any]
  # (leaf, draw, slope f32[] or f32[L], basis) -> the direction times the slope, f32.
  estimate: Callable[[Leaf, jax.Array, jax.Array, Any], jax.Array]
  # (leaf, momentum, draw, slope, state) -> (estimate, momentum); replaces `estimate` if given.
  remember: Callable | None = None
  # (leaves, draw) -> f32[], what all numbers of a direction are multiplied by; None for 1.
  factor: Callable | None = None


def estimator(
  directions: Directions,
  eps: float,
  *,
  samples: int = 1,
  measure: str = 'two_sided',
  blockwise: bool = False,
  targets=None,
  form: str = 'arrays',
  stack: str = 'blocks',
  trial: optax.Schedule | None = None,
  window: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Returns the optax transform of an estimator.

  `update(_, state, params, value_fn=f)` evaluates `f` and hands on an estimate of its gradient.
  With `layer` (see `memjax.transforms.layers`) or `measured=True` in place of `value_fn`, it hands
  on the estimate for the slopes in its state, drawing directions again: so a training step measures
  once and then goes through its parameters layer by layer. With `slopes`, it takes those for
  measured, as a replay does; with `hand_on=False` it only measures. With `halves`, the sharding of
  two numbers over a mesh axis of size two, each half of the mesh takes the values on one side.

  Args:
    directions: Of the estimator.
    eps: Distance at which values are taken, in units of the noise's standard deviation.
    samples: Directions `n` a step, all from the same parameters; their estimates are averaged.
    measure: `'two_sided'`, `(f(+eps) - f(-eps)) / 2 eps`; `'one_sided'`, `(f(+eps) - f(0)) / eps`;
      or `'forward'`, the exact derivative along the direction.
    blockwise: Perturbs one group at a time: each layer, and each other first key of the parameters.
      Takes `G` times as many values, whose estimate has the variance of a group's size.
    targets: Function of a leaf's slash path that says whether it is trained; None trains all. The
      others are neither perturbed nor moved.
    form: Of perturbed parameters: `'arrays'` for any function, `'weights'` for functions that ask
      their leaves through `memjax.weights`, as models here do: then noise exists only where a
      weight is used.
    stack: First key of leaves that are stacked over layers.
    trial: Learning rate of a count of finished updates. Takes the values after the update, after
      its opposite and without one, and hands on what led to the lowest; for one direction.
    window: Estimates `W` whose slopes are remembered, for directions that read them.

  Raises:
    ValueError: here for an argument out of range; by `init` for leaves that are not floating-point
      numbers, naming one; by `update` without `value_fn`, or with one that does not return a
      scalar.
  """
  _check(eps, samples, measure, form)

  def init(params):
    leaves = describe(params, stack, blockwise, targets)
    basis, momentum = directions.init(leaves)
    dtype = leaves.dtype
    return EstimatorState(
      count=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
      last=jnp.full((), -1, jnp.int32),
      previous=jnp.full((), -1, jnp.int32),
      value=jnp.full((), jnp.nan, dtype),
      slopes=jnp.zeros((samples, leaves.groups), dtype),
      moments=jnp.zeros(2, dtype),
      difference=jnp.zeros((), dtype),
      history=jnp.zeros((window, samples, leaves.groups), dtype) if window else None,
      numbers=jnp.full(window, -1, jnp.int32) if window else None,
      basis={name: leaves.tree(parts) for name, parts in basis.items()},
      momentum=leaves.tree(momentum),
    )

  def update(
    updates,
    state,
    params=None,
    *,
    value_fn=None,
    layer=None,
    measured=False,
    slopes=None,
    hand_on=True,
    halves=None,
    **extra_args,
  ):
    del extra_args
    if params is None:
      raise ValueError('an estimator perturbs the parameters: call update(_, state, params, ...)')
    if halves is not None and measure != 'two_sided':
      raise ValueError(f'halves of a mesh take the values of two sides; measure is {measure!r}')
    if value_fn is None and slopes is None and layer is None and not measured:
      raise ValueError(
        'an estimator takes no gradients, it makes them: call update(_, state, params, '
        'value_fn=loss), where loss(params) is a scalar'
      )
    leaves = describe(params, stack, blockwise, targets, layer)
    if slopes is not None:
      state = move(leaves, state, renew(leaves, state), slopes, state.value)
    elif value_fn is not None:
      state = observe(leaves, state, value_fn, halves)
    return estimates(leaves, state) if hand_on else (updates, state)

  def renew(leaves, state):
    basis = {name: leaves.list(tree) for name, tree in state.basis.items()}
    return directions.refresh(leaves, basis, state.count)

  def observe(leaves, state, value_fn, halves):
    """Takes the values."""
    basis, dtype = renew(leaves, state), state.value.dtype

    def evaluate(draw, scales):
      parts = [
        directions.perturb(leaf, value, draw, group_scales(leaf, scales), b)
        if leaf.trained
        else value
        for leaf, value, b in zip(leaves, leaves.values, parts_of(leaves, basis), strict=True)
      ]
      parts = parts if form == 'weights' else list(map(weights.materialize, parts))
      return _scalar(value_fn(leaves.tree(parts))).astype(dtype)

    def factor(draw):
      return 1.0 if directions.factor is None else directions.factor(leaves, draw)

    base = state.count * samples
    task = _Task(evaluate, factor, base, eps, samples, leaves.groups, dtype, halves)
    slopes, value = (_MEASURE[measure] if halves is None else _on_halves)(task)
    if trial is not None:
      rate = trial(state.count - state.skipped)
      slopes = _best(lambda scale: evaluate(base, scale), rate, slopes)
    return move(leaves, state, basis, slopes, value)

  def move(leaves, state, basis, slopes, value):
    """Returns the state after a measurement; one that is not finite is skipped."""
    # A replay knows no value, and a skipped estimate by its slopes alone.
    finite = jnp.all(jnp.isfinite(slopes)) & ((value is state.value) | jnp.isfinite(value))
    keep = lambda new, old: jnp.where(finite, new, old)
    seen = jnp.stack([jnp.mean(slopes), jnp.mean(slopes**2)])
    span = {'two_sided': 2 * eps, 'one_sided': eps, 'forward': 0.0}[measure]
    return EstimatorState(
      count=state.count + 1,
      skipped=state.skipped + jnp.where(finite, 0, 1),
      last=keep(state.count, state.last),
      previous=state.last,
      value=keep(value, state.value),
      slopes=keep(slopes, jnp.zeros_like(slopes)),
      moments=keep(FORGET * state.moments + (1 - FORGET) * seen, state.moments),
      difference=keep(span * jnp.sqrt(seen[1]), 0.0),
      history=keep(_push(state.history, slopes), state.history) if window else None,
      numbers=keep(_push(state.numbers, state.count), state.numbers) if window else None,
      basis={name: leaves.tree(parts) for name, parts in basis.items()},
      momentum=state.momentum,
    )

  def estimates(leaves, state):
    """Draws the directions again, each times its slope."""
    first = (state.count - 1) * samples
    basis = {name: leaves.list(tree) for name, tree in state.basis.items()}
    found, new = [], []
    for leaf, b, m in zip(
      leaves, parts_of(leaves, basis), leaves.list(state.momentum), strict=True
    ):
      if not leaf.trained:
        estimate = jnp.zeros(leaf.shape, leaf.dtype)
      elif directions.remember is not None:
        slope = group_scales(leaf, state.slopes[0])
        estimate, m = directions.remember(leaf, m, first, slope, state)
      else:
        estimate = _mean(directions, leaf, b, first, state.slopes)
      found.append(estimate.astype(leaf.dtype))
      new.append(m)
    return leaves.tree(found), state._replace(momentum=leaves.tree(new))

  return optax.GradientTransformationExtraArgs(init, update)


def parts_of(leaves: Leaves, basis: dict[str, list]) -> list[dict]:
  """Returns a dict of its own for every leaf."""
  return [{name: parts[i] for name, parts in basis.items()} for i in range(len(leaves))]


def find(state: Any) -> EstimatorState:
  """Returns the state of the one estimator in an optax state.

  Raises:
    ValueError: if there is none, or more than one.
  """
  found = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
  if len(found) != 1:
    raise ValueError(
      f'{len(found)} estimators in the optimizer; a zeroth-order step needs one, first in its '
      'chain, such as memjax.spsa() or memjax.lozo()'
    )
  return found[0]


def is_state(x: Any) -> bool:
  return isinstance(x, EstimatorState)


def _mean(directions, leaf, basis, first, slopes):
  """The estimates along `n` directions, averaged one after the other."""
  samples = slopes.shape[0]

  def one(i):
    slope = group_scales(leaf, slopes[i]) / samples
    return directions.estimate(leaf, first + i, slope, basis)

  if samples == 1:
    return one(0)  # Without a loop the compiler fuses the draw with what uses it.
  zero = jnp.zeros(leaf.shape, leaf.dtype)
  return lax.fori_loop(0, samples, lambda i, total: total + one(i).astype(leaf.dtype), zero)


class _Task(NamedTuple):
  """What a measurement is made of."""

  evaluate: Callable  # (draw, scales of the groups [G]) -> value.
  factor: Callable  # draw -> what its directions are multiplied by.
  base: jax.Array  # Number of the first draw.
  eps: float
  samples: int
  groups: int
  dtype: Any
  halves: jax.sharding.NamedSharding | None

  def one(self, index, size):
    """Draw and scales of the `index`-th pair of a direction and a group."""
    draw = self.base + index // self.groups
    scale = size * self.factor(draw)
    mine = jnp.arange(self.groups) == index % self.groups
    return draw, jnp.where(mine, scale, 0).astype(self.dtype)

  def slopes(self, differences):
    """Slopes `[n, G]` of derivatives along directions of unit variance, `[n G]`."""
    factors = [jnp.asarray(self.factor(self.base + i), self.dtype) for i in range(self.samples)]
    return differences.reshape(self.samples, self.groups) * jnp.stack(factors)[:, None]


# Values are taken one after the other by a loop, in which the compiler cannot run two at once and
# hold the activations of both.


def _two_sided(task):
  """Slopes `[n, G]` and the mean value, from `2 n G` values."""

  def value(index):
    return task.evaluate(*task.one(index // 2, task.eps * (1 - 2 * (index % 2))))

  return _of_pairs(task, lax.map(value, jnp.arange(2 * task.samples * task.groups)).reshape(-1, 2))


def _on_halves(task):
  """As `_two_sided`, the values of a pair at once, each on a half of the mesh."""
  spec = task.halves.spec

  def pair(index):
    value = lambda side: task.evaluate(*task.one(index, side[0]))[None]
    # Other axes of the mesh stay the compiler's.
    on_half = jax.shard_map(
      value,
      mesh=task.halves.mesh,
      in_specs=spec,
      out_specs=spec,
      axis_names={spec[0]},
      check_vma=False,
    )
    return on_half(jnp.array([task.eps, -task.eps]))

  return _of_pairs(task, lax.map(pair, jnp.arange(task.samples * task.groups)))


def _of_pairs(task, values):
  return task.slopes((values[:, 0] - values[:, 1]) / (2 * task.eps)), jnp.mean(values)


def _one_sided(task):
  """Slopes `[n, G]` and the value at the parameters, from `n G + 1` values."""
  pairs = task.samples * task.groups

  def value(index):
    # The last is not perturbed.
    return task.evaluate(*task.one(index % pairs, jnp.where(index < pairs, task.eps, 0.0)))

  values = lax.map(value, jnp.arange(pairs + 1))
  return task.slopes((values[:-1] - values[-1]) / task.eps), values[-1]


def _forward(task):
  """Slopes `[n, G]` and the value at the parameters, from `n G` Jacobian-vector products."""

  def value_and_slope(index):
    draw, along = task.one(index, 1.0)
    value = lambda scales: task.evaluate(draw, scales)
    value, slope = jax.jvp(value, (jnp.zeros_like(along),), (along,))
    return value, slope / task.factor(draw)  # Which `slopes` multiplies by.

  values, slopes = lax.map(value_and_slope, jnp.arange(task.samples * task.groups))
  return task.slopes(slopes), values[0]


def _push(rows, new):
  """Drops the first row and appends another."""
  return jnp.concatenate([rows, new[None]])[1:]


def _best(evaluate, rate, slopes):
  """The slopes, their negatives or zeros, whichever update leads to the lowest value."""
  signs = jnp.array([0.0, 1.0, -1.0], slopes.dtype)  # The first of equals: to stay.
  values = lax.map(lambda sign: evaluate((-sign * rate * slopes[0]).astype(slopes.dtype)), signs)
  # The least of numbers with NaN among them would be NaN.
  return signs[jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))] * slopes


_MEASURE = {'two_sided': _two_sided, 'one_sided': _one_sided, 'forward': _forward}


def _scalar(value):
  if not jax.tree_util.all_leaves([value]):
    raise ValueError(
      f'value_fn returned a {type(value).__name__}; an estimator compares single numbers: return '
      'the loss alone'
    )
  if jnp.shape(value) != ():
    raise ValueError(
      f'value_fn returned an array of shape {jnp.shape(value)}; an estimator compares single '
      'numbers: return the mean over the batch'
    )
  return jnp.asarray(value)


def _check(eps, samples, measure, form):
  if measure != 'forward' and not eps > 0:
    raise ValueError(f'eps is {eps}; values must be taken at some distance, such as 1e-3')
  if samples < 1:
    raise ValueError(f'samples is {samples}; an estimate takes at least one direction')
  for what, word, known in (('measure', measure, MEASURES), ('form', form, FORMS)):
    if word not in known:
      raise ValueError(f'{what} {word!r} does not exist; {nearest(str(word), known)}')
