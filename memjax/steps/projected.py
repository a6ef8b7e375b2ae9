"""The layer-by-layer step over micro-batches whose gradients add up where they are projected.

Shapes in this file: `L` layers, `B` sequences of `T` tokens in `A` micro-batches, hidden width `D`.
The gradient of a matrix is `[m, n]`, its projection `[r, n]`, `[m, r]` or `[r, r]`.

`layerwise` sums up one layer's gradient over all micro-batches before it goes to the layer below,
and so keeps what every layer read of every micro-batch. Here a micro-batch goes forward and back
through all layers, and of each layer's gradient leaves the projection alone; the update comes last,
layer by layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from memjax import transforms, weights
from memjax.steps import clipping, held, layerwise, slices
from memjax.steps.backward import EMBED, Task, backward, forward
from memjax.steps.micro_batches import split
from memjax.steps.slices import STACK
from memjax.transforms.layers import Layer


def make_train_step(
  model: Any,
  transform: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  rounding_key=None,
  shardings=None,
):
  """Returns `step(state, batch) -> (state, metrics)`, with the results of `whole_tree`'s with
  `accumulate_in='subspace'`.

  Memory beside parameters and optimizer state: the layers' inputs of one micro-batch, `L (B/A) T D`
  numbers; the sum of projections, f32[L, r, n] a matrix, and of embedding, head and norms as they
  are; one layer's gradient. Time: that of `layerwise`, and a product `m n r` a matrix and
  micro-batch. Bases come from the first micro-batch alone; there is no clipping, since nothing
  holds the gradients; `train/grad_norm` is that of the projections.

  Args:
    model: Has `embed`, `block`, `head_loss` and `tied`, as `memjax.models.Llama`.
    transform: As `layerwise` takes it, and made with `memjax.transforms.project`.
    accumulate: Micro-batches `A` a batch is cut into; divides `B`.
    rounding_key: Root key of the stochastic rounding of 16-bit parameters; None rounds to nearest.
    shardings: `NamedSharding`s of the training state. None leaves it to the compiler.

  Raises:
    ValueError: when the step is traced, as `layerwise` does, and for a transform without bases that
      its state keeps.
  """
  transform = optax.with_extra_args_support(transform)
  lay_out = layerwise.lay_out_like(shardings)

  def step(state, batch):
    dense = weights.dense(weights.trained(state['params']))
    opt, treedef = jax.tree.flatten(state['opt'])
    slots = slices.plan(transform, dense)
    holder = held.together(slots, layerwise.shardings_of(treedef, shardings))
    add = _make_add(transform, treedef, holder, slices.count_layers(dense))
    count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)
    parts = split(batch, accumulate)
    parts = parts if accumulate > 1 else jax.tree.map(lambda x: x[None], parts)

    def one(carry, indexed):
      turn, part = indexed
      task = Task(model, part, 1, count, lay_out, turn)
      last, inputs = forward(task, carry['params'])
      use = lambda carry, grads, index: add(carry, grads, index, turn == 0)
      loss, carry = backward(task, last, inputs, carry, use)
      return carry, loss

    sums = _zeros(jax.eval_shape(transforms.project_gradient, dense, state['opt']))
    carry = {'params': state['params'], 'opt': opt, 'sums': sums}
    carry, losses = lax.scan(one, carry, (jnp.arange(accumulate), parts))
    sums = carry.pop('sums')
    advance = layerwise.make_advance(
      _of_projections(transform), state, treedef, holder, rounding_key
    )
    carry = _update(carry, sums, advance)
    norm = jnp.sqrt(clipping.square(sums))
    metrics = {'train/loss': jnp.sum(losses), 'train/grad_norm': norm}
    params, opt = carry['params'], treedef.unflatten(carry['opt'])
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, metrics

  return step


def _make_add(transform, treedef, holder: held.Holder, layers: int):
  """Returns `add(carry, grads, index, first) -> carry`: a unit's gradients join the sums.

  Args:
    transform: The transform.
    treedef: Structure of its state; `carry['opt']` are the leaves.
    holder: How these hold a unit's state.
    layers: Layers `L`.
  """

  def add(carry, grads, index, first):
    unit = held.Unit(tuple(grads), index, index)
    layer = jnp.int32(0) if index is None else index  # The transform always sees a single layer.
    params = {**carry['params'], STACK: slices.take(carry['params'][STACK], layer)}
    params = weights.dense(weights.trained(params))
    whole = {k: grads[k] if k in grads else _zeros(params[k]) for k in params}
    before = holder.take(carry['opt'], unit, None)
    opt = transforms.refresh_subspace(
      transform, whole, treedef.unflatten(before), params, first, layer=Layer(layer, layers, STACK)
    )
    reduced = transforms.project_gradient(whole, opt)
    sums = carry['sums'] | {
      name: _added(carry['sums'][name], reduced[name], index) for name in grads
    }
    after = jax.tree.leaves(opt)
    put = zip(holder.put(carry['opt'], after, unit), carry['opt'], after, before, strict=True)
    # Most of the state is as it was: moments on the host stay there until the update.
    opt = [old if same is was else new for new, old, same, was in put]
    return {**carry, 'opt': opt, 'sums': sums}

  return add


def _update(carry, sums, advance):
  """Updates all units from their sums, from the top down."""
  layers = slices.count_layers(carry['params'])
  head = {name: sums[name] for name in sums if name not in (STACK, EMBED)}

  def body(step, carry):
    index = layers - 1 - step
    return advance(carry, {STACK: slices.take(sums[STACK], index)}, index)

  carry = lax.fori_loop(0, layers, body, advance(carry, head, None))
  return advance(carry, {EMBED: sums[EMBED]}, None)


def _of_projections(transform):
  """The transform, given projections; gradients of units that are not there may be whole."""

  def update(grads, state, params, **extra_args):
    shapes = jax.eval_shape(transforms.project_gradient, params, state)
    fit = lambda like, x: x if x.shape == like.shape else jnp.zeros(like.shape, like.dtype)
    reduced = jax.tree.map(fit, shapes, grads)
    return transform.update(reduced, state, params, projected=True, **extra_args)

  return optax.GradientTransformationExtraArgs(transform.init, update)


def _added(total, part, index):
  if index is None:
    return jax.tree.map(jnp.add, total, part)
  return slices.put(total, jax.tree.map(jnp.add, slices.take(total, index), part), index)


def _zeros(tree):
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
