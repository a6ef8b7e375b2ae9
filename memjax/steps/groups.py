"""Training steps in which parts of the parameters take turns: HiFT, BAdam, LISA.

Shapes in this file: `L` layers, `B` sequences of `T` tokens, hidden width `D`. A unit is the
embedding, one layer, or the head with the last norm; they are numbered from the bottom, 0 to
`L + 1`. A stacked leaf is `[L, ...]`, one layer of it `[1, ...]`.

The units that train in a step are a traced `bool[L + 2]`, so that one compiled program serves all
turns: loops run as often as there is something to train. A unit that may or may not train is a loop
of one turn or none, and not a `cond`, because what a loop carries is updated in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax import transforms, weights
from memjax.steps import backward as passes
from memjax.steps import clipping, held, layerwise, slices
from memjax.steps.backward import EMBED
from memjax.steps.micro_batches import accumulate as over_micro_batches
from memjax.steps.micro_batches import split
from memjax.steps.rotations import Rotation
from memjax.steps.slices import STACK

# Called with the schedule of the learning rate; returns a transform, as `optax.adamw` does.
Optimizer = Callable[[optax.Schedule], optax.GradientTransformation]


def init_state(init_params, optimizer: Optimizer, rotation: Rotation, key) -> dict:
  """Returns the training state before the first update, as `whole_tree.init_state` does.

  State of layers is `[S, ...]`: for all `L` of them where the rotation keeps it, else for the
  `rotation.size` whose turn it is. State that belongs to no parameter, such as counts, is
  `[S + 2, ...]`: each unit's own.
  """
  params = init_params(key)
  dense = weights.dense(weights.trained(params))
  transform, slots, size = _plan(optimizer, rotation, params)
  some = {**dense, STACK: jax.tree.map(lambda x: x[:size], dense[STACK])}
  leaves, treedef = jax.tree.flatten(transform.init(some))
  opt = treedef.unflatten(held.init_apart(slots, leaves, size, rotation.ends))
  return {'step': jnp.zeros((), jnp.int32), 'params': params, 'opt': opt}


def make_train_step(
  model: Any,
  optimizer: Optimizer,
  rotation: Rotation,
  schedule: optax.Schedule,
  *,
  accumulate: int = 1,
  clip_norm: float | None = None,
  clip_by: str = 'global',
  rounding_key=None,
  shardings=None,
):
  """Returns `step(state, batch) -> (state, metrics)` that trains the units whose turn it is.

  A unit counts its own updates, so that Adam corrects the bias of what its moments have seen; the
  learning rate is the step's, whatever a unit counts. The backward pass goes down to the lowest
  unit that trains, and forms the parameters' gradients in those alone.

  Memory beside parameters and optimizer state: that of `layerwise`, whatever trains. Time: one
  forward pass, and of each layer from the top to the lowest that trains one more and the cotangent
  of its input; the head runs twice where it trains. State in host memory is moved a unit at a time.

  Args:
    model: Has `embed`, `block`, `head_loss` and `tied`, as `memjax.models.Llama`.
    optimizer: Function of a schedule that returns a transform as `layerwise` takes it.
    rotation: Of `memjax.steps.rotations`.
    schedule: Learning rate as a function of finished updates; the rotation says how often it is
      looked up.
    accumulate: Micro-batches a batch is cut into; turns change between updates, never in between.
    clip_norm: Largest norm of the gradient of what trains; None does not clip.
    clip_by: `'global'` or `'layer'`, as in `layerwise`.
    rounding_key: Root key of the stochastic rounding of 16-bit parameters; None rounds to nearest,
      and so do rotations that train f32 copies.
    shardings: `NamedSharding`s of the training state. None leaves it to the compiler.

  Raises:
    ValueError: as `layerwise` does.
  """
  clipping.check(clip_by)
  lay_out = layerwise.lay_out_like(shardings)
  learning_rate = rotation.learning_rate(schedule)
  rounding_key = None if rotation.master else rounding_key

  def step(state, batch):
    rate = learning_rate(state['step'])
    transform, slots, size = _plan(optimizer, rotation, state['params'], rate)
    treedef = _treedef(transform, state['params'])
    renew = None if rotation.keep else state['step'] % rotation.every == 0
    where = layerwise.shardings_of(treedef, shardings)
    advance = layerwise.make_advance(
      transform, state, treedef, held.apart(slots, where, size, renew), rounding_key
    )
    count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)
    task = passes.Task(model, split(batch, accumulate), accumulate, count, lay_out)
    active = rotation.active(state['step'])
    last, inputs = passes.forward(task, state['params'])
    opt = treedef.flatten_up_to(state['opt'])
    carry = {'square': jnp.float32(0), 'params': state['params'], 'opt': opt}

    def walk(last, carry, use):
      return backward(task, active, last, inputs, carry, use)

    def update(carry, grads, index, turn):
      return advance(carry, grads, index, index if rotation.keep else turn)

    loss, carry = clipping.clipped(walk, last, carry, update, clip_norm, clip_by)
    metrics = {'train/loss': loss, 'train/grad_norm': jnp.sqrt(carry['square'])}
    params, opt = carry['params'], treedef.unflatten(carry['opt'])
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, metrics

  return step


def backward(task: passes.Task, active, last, inputs, carry: dict, use: Callable):
  """Forms the gradients of the active units, from the head down to the lowest of them.

  Args:
    task: What to differentiate.
    active: bool[L + 2], the units.
    last: Hidden states after the last block.
    inputs: Inputs of the blocks, `[L, ...]`.
    carry: Dict with `params`; updated in place.
    use: `use(carry, grads, index, turn) -> carry`, as in `backward.backward`; `turn` counts the
      layers that had theirs before, None for the embedding and the head.

  Returns:
    The mean loss f32[], and the last carry.
  """
  params, layers = carry['params'], active.shape[0] - 2
  once = lambda unit, function, carry: lax.fori_loop(
    0, active[unit].astype(jnp.int32), lambda _, carry: function(carry), carry
  )
  loss, _, cotangent = passes.head_grads(task, params, last)
  # A tied embedding's gradient is taken last, at what the head was before its turn.
  before = {k: params[k] for k in params if k not in (STACK, EMBED)} if task.model.tied else {}

  def head(carry):
    _, grads, _ = passes.head_grads(task, carry['params'], last)
    return use(carry, task.lay_out({k: grads[k] for k in grads if k != EMBED}), None, None)

  cotangent, carry = lax.optimization_barrier((cotangent, once(-1, head, carry)))

  def descend(cotangent, index, carry):
    """Past the layers that do not train, to one that does or below the last."""

    def skip(state):
      cotangent, index = state
      return _input_cotangent(
        task, *passes.take_layer(carry['params'], inputs, index), cotangent
      ), index - 1

    idle = lambda state: (state[1] >= 0) & ~active[state[1] + 1]
    return lax.while_loop(idle, skip, (cotangent, index))

  def train(turn, state):
    cotangent, index, carry = state
    cotangent, index = descend(cotangent, index, carry)
    grads, cotangent = passes.layer_grads(task, carry['params'], inputs, cotangent, index)
    return cotangent, index - 1, use(carry, {STACK: grads}, index, turn)

  state = (cotangent, jnp.int32(layers - 1), carry)
  cotangent, index, carry = lax.fori_loop(0, jnp.sum(active[1:-1]), train, state)

  def embedding(carry):
    below, _ = descend(cotangent, index, carry)
    grads = passes.embed_grads(task, carry['params'], below)
    if task.model.tied:
      _, tied, _ = passes.head_grads(task, {**carry['params'], **before}, last)
      grads = jax.tree.map(jnp.add, tied[EMBED], grads)
    return use(carry, task.lay_out({EMBED: grads}), None, None)

  return loss, once(0, embedding, carry)


def _input_cotangent(task, layer, x, cotangent):
  """Cotangents of one layer's input, where its parameters do not train."""

  def one(part, index):
    x, cotangent = part
    seen = weights.in_part(layer, index)
    return (), jax.vjp(lambda x: passes.run_block(task, seen, x), x)[1](cotangent)[0]

  return over_micro_batches(one, (x, cotangent), task.number)[1]


def make_transform(optimizer: Optimizer, rotation: Rotation, schedule: optax.Schedule):
  """Returns the transform whose state a rotation's steps hold."""
  transform = optax.with_extra_args_support(optimizer(schedule))
  return transforms.keep_master(transform) if rotation.master else transform


def _plan(optimizer, rotation, params, rate=0.0):
  """The transform at a learning rate, where its state belongs, and the slots `S` of layers."""
  transform = make_transform(optimizer, rotation, lambda count: rate)
  size = slices.count_layers(params) if rotation.keep else rotation.size
  return transform, slices.plan(transform, weights.dense(weights.trained(params))), size


def _treedef(transform, params):
  """The structure of the transform's own state, where nothing is left out."""
  return jax.tree.structure(jax.eval_shape(transform.init, weights.dense(weights.trained(params))))
