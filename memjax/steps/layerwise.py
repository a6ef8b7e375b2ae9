"""The training step layer by layer: the whole gradient tree never exists.

Shapes in this file: `L` layers, `B` sequences of `T` tokens, hidden width `D`. A stacked leaf is
`[L, ...]`, one layer of it `[1, ...]`.

The forward pass keeps each layer's input. The backward pass is a loop whose carry holds the stacked
parameters and optimizer state: it forms one layer's gradient, transforms it, writes the layer's new
weights and state where the old ones were, and goes on to the layer before. (A scan that returned
new weights would hold a second copy of them all; a carry is updated in place.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from memjax import transforms, weights
from memjax.naming import path_string
from memjax.steps import clipping, held, slices
from memjax.steps.backward import Task, backward, forward
from memjax.steps.micro_batches import split
from memjax.steps.slices import STACK
from memjax.transforms.layers import Layer


def make_train_step(
  model: Any,
  transform: optax.GradientTransformation,
  *,
  accumulate: int = 1,
  clip_norm: float | None = None,
  clip_by: str = 'global',
  rounding_key=None,
  shardings=None,
):
  """Returns `step(state, batch) -> (state, metrics)`, with the results of `whole_tree`'s.

  Any transform will do whose update of a leaf needs that leaf alone; it sees one layer's slice of
  gradients, parameters and state, and its counts advance once a step. What it computes over a whole
  leaf (the root mean square in `optax.adafactor`) becomes a statistic of one layer, which is what
  is meant where layers are not stacked.

  Memory beside parameters and optimizer state: the layers' inputs, `L B T D` numbers; one layer's
  gradient, in its parameters' dtype, or f32 with `accumulate > 1`; what one block keeps for its
  backward pass, of one micro-batch; the gradient of the head, then that of the embedding (both at
  once if tied). Time: that of `whole_tree` with `remat='full'`, since every block runs twice.
  Communicates what that step does: a layer's weights are gathered, its gradient is reduced to the
  shards of its parameter. With `accumulate > 1` micro-batches take turns within each layer and not
  the other way round, so that gradients add up one layer at a time.

  Args:
    model: Has `embed`, `block`, `head_loss` and `tied`, as `memjax.models.Llama`.
    transform: Any optax transform as above; `layer`, see `memjax.transforms.layers`, is the only
      extra argument it is given.
    accumulate: Micro-batches a batch is cut into; divides `B`.
    clip_norm: Largest norm of the gradient, before the transform; None does not clip.
    clip_by: `'global'` clips by the norm of all gradients together, which takes another backward
      pass before the one that updates; `'layer'` clips each layer, and embedding, last norm and
      head, by its own norm, which takes none.
    rounding_key: Root key of the stochastic rounding of 16-bit parameters; None rounds to nearest.
    shardings: `NamedSharding`s of the training state; gradients are laid out like their parameters.
      None leaves it to the compiler.

  Raises:
    ValueError: here for an argument out of range; when the step is traced, for a transform whose
      leaves depend on each other, naming one of them.

  References:
    Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
    <https://arxiv.org/abs/2306.09782>`_, 2023 (the same with hooks, for plain descent)
  """
  clipping.check(clip_by)
  transform = optax.with_extra_args_support(transform)
  lay_out = lay_out_like(shardings)

  def step(state, batch):
    opt, treedef = jax.tree.flatten(state['opt'])
    slots = slices.plan(transform, weights.dense(weights.trained(state['params'])))
    holder = held.together(slots, shardings_of(treedef, shardings))
    advance = make_advance(transform, state, treedef, holder, rounding_key)
    count = jnp.maximum(jnp.sum(batch['weights'], dtype=jnp.float32), 1.0)
    task = Task(model, split(batch, accumulate), accumulate, count, lay_out)
    last, inputs = forward(task, state['params'])
    carry = {'square': jnp.float32(0), 'params': state['params'], 'opt': opt}

    def walk(last, carry, use):
      return backward(task, last, inputs, carry, use)

    loss, carry = clipping.clipped(walk, last, carry, advance, clip_norm, clip_by)
    metrics = {'train/loss': loss, 'train/grad_norm': jnp.sqrt(carry['square'])}
    params, opt = carry['params'], treedef.unflatten(carry['opt'])
    return {'step': state['step'] + 1, 'params': params, 'opt': opt}, metrics

  return step


def make_advance(transform, state, treedef, holder: held.Holder, rounding_key):
  """Returns `advance(carry, grads, index, slot=index) -> carry`: updates one unit's parameters and
  state.

  The transform is called on the whole tree, with zeros for the gradients that are not there, so
  that masks, labels and rules meet every leaf they know. What comes out for other units is used by
  nothing and the compiler drops it.

  Args:
    transform: The transform.
    state: Training state before the step.
    treedef: Structure of the transform's state; `carry['opt']` are its leaves.
    holder: How these leaves hold a unit's state.
    rounding_key: As in `make_train_step`.
  """
  layers = slices.count_layers(state['params'])
  key = None if rounding_key is None else jax.random.fold_in(rounding_key, state['step'])

  def advance(carry, grads, index, slot=None):
    unit = held.Unit(tuple(grads), index, index if slot is None else slot)
    if index is not None:
      carry, grads = _read_anew(carry, grads)
    layer = jnp.int32(0) if index is None else index  # The transform always sees a single layer.
    params = {**carry['params'], STACK: slices.take(carry['params'][STACK], layer)}
    trained = weights.trained(params)
    dense = weights.dense(trained)
    whole = {k: grads[k] if k in grads else _zeros_like(dense[k]) for k in dense}
    opt = holder.take(carry['opt'], unit, lambda: jax.tree.leaves(transform.init(dense)))
    updates, after = transform.update(
      whole, treedef.unflatten(opt), dense, layer=Layer(layer, layers, STACK)
    )
    mine = lambda tree: {name: tree[name] for name in grads}
    new = transforms.apply_updates(mine(trained), mine(updates), key, index)
    if index is not None:
      new = {STACK: slices.put(weights.trained(carry['params'][STACK]), new[STACK], index)}
    new = {name: weights.replaced(carry['params'][name], part) for name, part in new.items()}
    opt = holder.put(carry['opt'], jax.tree.leaves(after), unit)
    return {**carry, 'params': {**carry['params'], **new}, 'opt': opt}

  return advance


def _read_anew(carry, grads):
  """Makes the update of a layer read its weights again: what the pass made of them, such as an
  array of codes, would be kept for it otherwise.

  Leaf by leaf, so that a leaf may be updated before the gradients of the others exist.
  """
  stack = carry['params'][STACK]
  leaves, treedef = jax.tree.flatten(grads[STACK])
  pairs = zip(leaves, treedef.flatten_up_to(weights.trained(stack)), strict=True)
  leaves, trained = zip(*map(jax.lax.optimization_barrier, pairs), strict=True)
  stack = weights.replaced(stack, treedef.unflatten(trained))
  carry = {**carry, 'params': {**carry['params'], STACK: stack}}
  return carry, {STACK: treedef.unflatten(leaves)}


def shardings_of(treedef, shardings) -> list:
  """Returns the shardings of the leaves of the optimizer state, or as many Nones."""
  if shardings is None:
    return [None] * treedef.num_leaves
  return treedef.flatten_up_to(shardings['opt'])


def _zeros_like(tree):
  return jax.tree.map(jnp.zeros_like, tree)


def lay_out_like(shardings):
  """Returns a function that shards a dict of gradients like its parameters."""
  if shardings is None:
    return lambda grads: grads
  for path, sharding in jax.tree_util.tree_leaves_with_path(shardings['params'][STACK]):
    if sharding.spec and sharding.spec[0] is not None:
      raise ValueError(
        f'{STACK}/{path_string(path)}: the axis of layers is sharded over {sharding.spec[0]!r}, '
        'but a layer-by-layer step visits one layer after the other on all devices'
      )

  def lay_out(grads):
    where = {name: shardings['params'][name] for name in grads}
    return jax.lax.with_sharding_constraint(grads, where)

  return lay_out
