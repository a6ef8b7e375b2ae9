"""Zeroth-order training of models larger than the device: blocks live in the host's memory.

Shapes in this file: `L` layers, `B` sequences of `T` tokens, hidden width `D`; a stacked leaf is
`[L, ...]`, one layer of it `[1, ...]`.

Two forward passes go up through the blocks side by side. Each block visits the device once a step:
it receives the update of the step before, is seen perturbed one way and the other, and goes back.
So every update is applied one step late, and until then it is the few numbers that the estimator
keeps: the parameters in the training state are those before it. `make_flush` applies it; whoever
reads the parameters for another purpose than the next step flushes first, which changes none of the
steps to come. A log has a step as soon as it is measured: flushed, the parameters are those after
the log's last step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax import transforms, weights
from memjax.estimators.estimator import Directions, find, is_state
from memjax.estimators.leaves import describe, group_scales
from memjax.estimators.log import begun
from memjax.steps import diagnostics, lockstep, slices, streams
from memjax.steps.slices import STACK
from memjax.steps.zeroth_order import measure
from memjax.transforms.layers import Layer

State = dict[str, Any]


class Delayed(NamedTuple):
  """Optimizer state as the last step measured it, its update still to come."""

  due: jax.Array  # bool[], whether parameters have yet to receive that update.
  inner: optax.OptState  # Slopes, counts and so the learning rate of the step that made it.


class Method(NamedTuple):
  """What a streamed step estimates, and what becomes of it."""

  transform: optax.GradientTransformation  # A chain with one estimator, of one direction a step.
  directions: Directions  # That estimator's.
  eps: float  # Likewise; values are taken on both sides.
  targets: Callable[[str], bool] | None = None  # Likewise.
  rounding_key: jax.Array | None = None  # Root of stochastic rounding; None rounds to nearest.


def init_state(init_params: Callable, method: Method, key: jax.Array) -> State:
  """Returns the training state before the first update.

  Args:
    init_params: Function of a key that returns the parameters, see `streams.init`.
    method: What is estimated.
    key: PRNG key of the parameters.

  Raises:
    ValueError: for a transform that keeps state for each weight.
  """
  params = init_params(key)
  # Their values are asked for by nothing, and whole stacks are never on the device.
  blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _shapes(params))
  inner = method.transform.init(blank)
  _check(method, inner, blank)
  inner = begun(inner, lambda: streams.fingerprint(params))
  opt = Delayed(jnp.zeros((), bool), inner)
  return {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt': opt}


def make_train_step(model: Any, method: Method, *, shardings: dict | None = None):
  """Returns `step(state, batch) -> (state, metrics)`, a pure function to be jitted with its state
  donated.

  Equal bit for bit, once flushed, to `memjax.steps.zeroth_order`; an update has the learning rate
  of the step that made it. A step whose loss is not finite is skipped and counted, as there.
  Metrics are those of that step; `zo/update_ulps` is of what is trained outside the blocks.

  Memory of the device: embedding, head, norms and biases; of the blocks two matrices as they are
  stored, one after its update and one perturbed; the activations of two forward passes of one
  block. Memory of the host: the blocks' matrices, updated in place. Moves each of them to the
  device and back once a step; with a log, those of the first layer to the device once more. The log
  is that of `memjax.steps.zeroth_order`, see `memjax.steps.replay_streamed`. Communicates, on a
  mesh, what two forward passes do.

  Args:
    model: Has `embed`, `block` and `head_loss`, as `memjax.models.OPT`, and asks its leaves through
      `memjax.weights`.
    method: What is estimated.
    shardings: `NamedSharding`s of the training state, parameters as `streams.place` returns them;
      None has everything on one device.

  References:
    Wang et al., `ZO2: Scalable Zeroth-Order Fine-Tuning for Extremely Large Language Models with
    Limited GPU Memory <https://arxiv.org/abs/2503.12668>`_, 2025 (its code leaves the last update
    unapplied, and applies each with the learning rate of the next)
  """

  def step(state, batch):
    change, see = _Change(method, state), _See(method, state)
    rest, inner = change.rest()
    sides = [side * see.radius() for side in (1.0, -1.0)]
    views = [see.rest(rest, side) for side in sides]
    inputs = [(model.embed(view, batch['tokens']), side) for view, side in zip(views, sides)]
    blocks, where = state['params'][STACK], shardings and shardings['params'][STACK]
    outputs, blocks = _through_blocks(model.block, blocks, inputs, change, see, where)
    values = _losses(model, views, outputs, batch)
    # The log is of the weights that were perturbed, of all of them.
    rows, values = streams.first_rows(blocks, where, values)
    inner = _measured(method, {**rest, STACK: rows}, inner, values, see.factor())
    found = find(inner)
    opt = Delayed(jnp.ones((), bool), inner)
    new = {'step': state['step'] + 1, 'params': {**rest, STACK: blocks}, 'opt': opt}
    to_come, _ = _Change(method, new).rest()
    metrics = {
      'train/loss': diagnostics.loss(found),
      **diagnostics.slope_metrics(found),
      'zo/update_ulps': diagnostics.update_ulps(_trained_rows(rest), _trained_rows(to_come)),
    }
    return new, metrics

  return step


def make_flush(method: Method, *, shardings: dict | None = None):
  """Returns `flush(state, now=None) -> state`, a pure function to be jitted with its state donated:
  the update that is due is applied, if `now`, bool[], does not say otherwise.

  Moves every matrix to the device and back, one at a time.
  """

  def flush(state, now=None):
    later = state['opt'].due & ~now if now is not None else jnp.zeros((), bool)
    due = state['opt'].due & ~later
    change = _Change(method, {**state, 'opt': state['opt']._replace(due=due)})
    # In a loop of no or one turn, which is not fused with what a step does next: the same bits here
    # and there.
    before = {k: v for k, v in state['params'].items() if k != STACK}, state['opt'].inner
    rest, inner = lax.fori_loop(0, jnp.where(due, 1, 0), lambda *_: change.rest(), before)
    blocks, where = state['params'][STACK], shardings and shardings['params'][STACK]
    stacks, places = streams.flatten(blocks), streams.places(blocks, where)

    def body(index, stacks):
      for path, place in places.items():
        leaf = streams.take(stacks[path], place, index)
        stacks[path] = streams.put(stacks[path], change(path, leaf, index), place, index)
        # One after the other: the next is fetched when this one is gone.
        stacks, index = lax.optimization_barrier((stacks, index))
      return stacks

    layers = slices.count_layers(state['params'])
    turns = layers if now is None else jnp.where(now, layers, 0)
    stacks = lax.fori_loop(0, turns, body, stacks)
    params = {**rest, STACK: streams.unflatten(blocks, stacks)}
    return {**state, 'params': params, 'opt': Delayed(later, inner)}

  return flush


def again(method: Method, state: State, part: dict, slopes: jax.Array, index=None):
  """Makes an update of some of the parameters again, from slopes that are known.

  Args:
    method: As in the run; of its estimator, the transform alone is read.
    state: `step` and `opt` before the update, and `params`, which may be shapes.
    part: `{path: leaf}`: one layer `[1, ...]` of leaves of the blocks, by their whole paths; or
      parameters outside them.
    slopes: f32[1, 1], NaN for a step that was skipped.
    index: i32[], the layer; None outside the blocks.

  Returns:
    The part after the update, and the optimizer state, whose log has noted the step: with a
    fingerprint of this part alone.
  """
  inner = _noted(method, part, state['opt'].inner, slopes)
  # What is read of the part is read before it changes, or all of it would be copied.
  part, inner = lax.optimization_barrier((part, inner))
  opt = Delayed(jnp.ones((), bool), inner)
  change = _Change(method, {**state, 'step': state['step'] + 1, 'opt': opt})
  part, inner = change._apply(part, index)
  return part, Delayed(jnp.zeros((), bool), inner)


def _trained_rows(params):
  return diagnostics.first_rows(weights.dense(weights.trained(params)))


class _Change:
  """The update that is due, of the parameters of a training state."""

  def __init__(self, method: Method, state: State):
    self._transform, self._state = optax.with_extra_args_support(method.transform), state
    self._inner = state['opt'].inner
    self._due = state['opt'].due & ~find(self._inner).skips()
    self._layers = slices.count_layers(state['params'])
    key = method.rounding_key
    # The update is that of the step before.
    self._key = None if key is None else jax.random.fold_in(key, state['step'] - 1)

  def __call__(self, path: str, leaf: Any, index: jax.Array) -> Any:
    """Returns one layer `[1, ...]` of the blocks' leaf at a path, after the update."""
    path = f'{STACK}/{path}'
    return self._apply({path: leaf}, index)[0][path]

  def rest(self) -> tuple[dict, optax.OptState]:
    """Returns the parameters outside the blocks after the update, and the optimizer state, from
    which the next is made.
    """
    return self._apply({k: v for k, v in self._state['params'].items() if k != STACK}, None)

  def _apply(self, params, index):
    trained = weights.trained(params)
    dense = weights.dense(trained)
    zeros = jax.tree.map(jnp.zeros_like, dense)  # Gradients, which an estimator ignores.
    layer = Layer(jnp.int32(0) if index is None else index, self._layers, STACK)
    inner = _restrict(self._inner, dense)
    updates, after = self._transform.update(zeros, inner, dense, layer=layer)
    new = transforms.apply_updates(trained, updates, self._key, index)
    keep = lambda new, old: jnp.where(self._due, new, old)
    after = _restore(after, self._inner)
    new = weights.replaced(params, jax.tree.map(keep, new, trained))
    return new, jax.tree.map(keep, after, self._inner)


class _See:
  """Perturbed parameters, as the forward passes of this step see them."""

  def __init__(self, method: Method, state: State):
    self._method, self._state = method, state
    self._number = find(state['opt']).count

  def factor(self) -> jax.Array:
    """What all numbers of the direction are multiplied by, f32[]."""
    factor = self._method.directions.factor
    if factor is None:
      return jnp.float32(1)
    shapes = _shapes(self._state['params'])
    return factor(describe(shapes, STACK, False, self._method.targets), self._number)

  def radius(self) -> jax.Array:
    """Distance at which values are taken, f32[]."""
    return self._method.eps * self.factor()

  def rest(self, params: dict, side: jax.Array) -> dict:
    """Returns the parameters outside the blocks, `side` away along the direction."""
    return self._perturb(params, side, None)

  def layer(self, path: str, leaf: Any, side: jax.Array, index: jax.Array) -> Any:
    """Returns a leaf of a block, given as `[1, ...]`, without that axis."""
    path = f'{STACK}/{path}'
    layer = Layer(index, slices.count_layers(self._state['params']), STACK)
    return jax.tree.map(lambda x: x[0], self._perturb({path: leaf}, side, layer)[path])

  def _perturb(self, params, side, layer):
    trained = weights.trained(params)
    if not jax.tree.leaves(trained):
      return params
    leaves = describe(trained, STACK, False, self._method.targets, layer)
    perturb = self._method.directions.perturb

    def see(leaf, value):
      scale = group_scales(leaf, side[None])
      return perturb(leaf, value, self._number, scale, {}) if leaf.trained else value

    seen = leaves.tree([see(*pair) for pair in zip(leaves, leaves.values, strict=True)])
    return weights.replaced(params, seen)


def _through_blocks(block, blocks, inputs, change, see, shardings):
  """Both passes through all blocks.

  Args:
    block: The model's.
    blocks: Their parameters, `[L, ...]`.
    inputs: Hidden states `[B, T, D]` and the side of each pass.
    change: The update that is due.
    see: The perturbation.
    shardings: Of the blocks' parameters, or None.

  Returns:
    Hidden states after the last block, of each pass; the parameters after the update.
  """
  stacks, places = streams.flatten(blocks), streams.places(blocks, shardings)
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blocks)
  order = streams.order_of_use(block, one, inputs[0][0])
  sides = [side for _, side in inputs]

  def body(index, carry):
    xs, stacks, first = carry

    def one_pass(own, shared):
      x, side = own
      visit = streams.Visit(order, *shared, places, index, change)
      view = lambda path, leaf: see.layer(path, leaf, side, index)
      y = block(streams.visiting(visit, one, view), x)
      visit.finish()
      return y, (visit.stacks, visit.first)

    xs, (stacks, first) = lockstep.both(one_pass, *zip(xs, sides), (stacks, first))
    return xs, stacks, first

  first = streams.take(stacks[order[0]], places[order[0]], jnp.int32(0))
  carry = (tuple(x for x, _ in inputs), stacks, first)
  layers = jax.tree.leaves(blocks)[0].shape[0]
  outputs, stacks, _ = lax.fori_loop(0, layers, body, carry)
  return outputs, streams.unflatten(blocks, stacks)


def _losses(model, views, outputs, batch):
  """The mean loss of each pass, one after the other."""
  count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)
  values = []
  for view, x in zip(views, outputs):
    if values:  # Else the head is perturbed both ways at once.
      x, values[-1] = lax.optimization_barrier((x, values[-1]))
    values.append(model.head_loss(view, x, batch['targets'], batch['weights'])[0] / count)
  return jnp.stack(values)


def _measured(method, params, inner, values, factor):
  """The optimizer state after a measurement; what it is made of are numbers."""
  slope = (values[0] - values[1]) / (2 * method.eps) * factor
  value = jnp.mean(values)
  note = lambda s: s._replace(value=jnp.where(jnp.isfinite(value), value, s.value))
  inner = jax.tree.map(lambda s: note(s) if is_state(s) else s, inner, is_leaf=is_state)
  return _noted(method, params, inner, slope[None, None])


def _noted(method, params, inner, slopes):
  """The optimizer state with the slopes of a step, which the log notes; with them goes a
  fingerprint of the parameters' first rows, all that is read of them.
  """
  params = weights.dense(weights.trained(params))
  state = {'params': params, 'opt': _restrict(inner, params)}
  return _restore(measure(method.transform, state, slopes=slopes), inner)


def _restrict(inner, params):
  """Optimizer state for some of the parameters. For none of them does it hold an array: what is cut
  is the shape of its trees.
  """
  nothing = jax.tree.map(lambda _: None, params, is_leaf=weights.is_weight)

  def restrict(s):
    basis = dict.fromkeys(s.basis, nothing)
    return s._replace(basis=basis, momentum=nothing)

  return jax.tree.map(lambda s: restrict(s) if is_state(s) else s, inner, is_leaf=is_state)


def _restore(inner, like):
  """The opposite of `_restrict`."""

  def restore(s, like):
    return s._replace(basis=like.basis, momentum=like.momentum) if is_state(s) else s

  return jax.tree.map(restore, inner, like, is_leaf=is_state)


def _shapes(params):
  """Parameters as shapes of arrays."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  return weights.dense(weights.trained(shapes))


def _check(method, inner, params):
  """Refuses what would have to be streamed beside the weights, or read before them."""
  found = find(inner)
  owners = [slot.owner for slot in slices.plan(method.transform, params) if slot.owner]
  if owners:
    raise ValueError(
      f'the optimizer keeps state for {owners[0]}, but a streamed step keeps none for the weights '
      "that it streams; use plain descent, or step='zeroth_order' on a larger device"
    )
  if found.slopes.size != 1:
    raise ValueError(
      f'the optimizer takes slopes of shape {found.slopes.shape} a step, but a streamed step '
      'sends the blocks through the device once: one direction, all parameters'
    )
