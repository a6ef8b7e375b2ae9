"""Forward and backward pass of a model in pieces: a gradient is handed on as soon as it exists.

Shapes in this file: `L` layers, `B` sequences of `T` tokens in `A` micro-batches, hidden width `D`.
Hidden states are `[B, T, D]`, or `[A, B/A, T, D]` for more than one micro-batch; the layers' inputs
have an axis `L` in front. One layer of a stacked parameter `[L, ...]` is `[1, ...]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax import weights
from memjax.steps import slices
from memjax.steps.micro_batches import accumulate
from memjax.steps.slices import STACK

EMBED = 'embed'  # The key of the parameters that `model.embed` reads.


class Task(NamedTuple):
  """What a pass runs on."""

  model: Any  # With `embed`, `block`, `head_loss` and `tied`, as `memjax.models.Llama`.
  batch: dict  # As `micro_batches.split` returns it.
  number: int  # Micro-batches.
  count: jax.Array  # f32[], tokens of the whole batch; the loss is the mean over them.
  lay_out: Callable  # Of a dict of gradients: returns it sharded like the parameters.
  only: Any = None  # Number of the only micro-batch here, see `micro_batches.accumulate`.


def forward(task: Task, params: dict) -> tuple[jax.Array, jax.Array]:
  """Returns the hidden states after the last block, and every block's input `[L, ...]`."""
  model = task.model

  def each(function, parts):
    return accumulate(lambda *part: ((), function(*part)), parts, task.number, task.only)[1]

  x = each(lambda tokens, _: model.embed(params, tokens), task.batch['tokens'])

  def body(x, layer):
    return each(lambda x, index: model.block(weights.in_part(layer, index), x), x), x

  return lax.scan(body, x, params[STACK])


def backward(task: Task, last, inputs, carry: dict, use: Callable) -> tuple[jax.Array, dict]:
  """Forms the gradients from the head down to the embedding, a group at a time.

  Groups are what the head reads, each layer, and the embedding; a tied embedding's gradient is
  completed last. A group's gradient is taken at the parameters that `carry` holds when its turn
  comes, so `use` may change a group once its gradient exists.

  Args:
    task: What to differentiate.
    last: Hidden states after the last block.
    inputs: Inputs of the blocks, `[L, ...]`.
    carry: Dict with `params`; the carry of a loop over layers, hence updated in place.
    use: `use(carry, grads, index) -> carry`; `grads` is a dict of gradients in the parameters'
      structure, `index` the layer, whose gradients are `[1, ...]`, or None.

  Returns:
    The mean loss f32[], and the last carry.
  """
  loss, grads, cotangent = head_grads(task, carry['params'], last)
  # The loss is computed now: the compiler would else keep a copy of the old head for it.
  loss, grads, cotangent = lax.optimization_barrier((loss, grads, cotangent))
  tied = grads.pop(EMBED, None)
  carry = use(carry, task.lay_out(grads), None)
  # The head's gradient is used up before the first layer's is formed.
  cotangent, carry = lax.optimization_barrier((cotangent, carry))
  layers = slices.count_layers(carry['params'])

  def body(step, state):
    cotangent, carry = state
    index = layers - 1 - step
    grads, cotangent = layer_grads(task, carry['params'], inputs, cotangent, index)
    return cotangent, use(carry, {STACK: grads}, index)

  cotangent, carry = lax.fori_loop(0, layers, body, (cotangent, carry))
  grads = embed_grads(task, carry['params'], cotangent)
  if tied is not None:
    grads = jax.tree.map(jnp.add, tied, grads)
  return loss, use(carry, task.lay_out({EMBED: grads}), None)


def head_grads(task, params, last):
  """Mean loss, gradients of what is trained of the parameters that the head reads, cotangents of
  the hidden states.
  """
  read = EMBED if task.model.tied else None
  params = {key: params[key] for key in params if key not in (STACK, EMBED) or key == read}
  trained = weights.trained(params)

  def share(trained, x, part, index):
    read = weights.replaced(weights.in_part(params, index), trained)
    return task.model.head_loss(read, x, part['targets'], part['weights'])[0] / task.count

  def one(part, index):
    x, part = part
    loss, (grads, cotangent) = jax.value_and_grad(share, argnums=(0, 1))(trained, x, part, index)
    return (loss, grads), cotangent

  (loss, grads), cotangent = accumulate(one, (last, task.batch), task.number, task.only)
  return loss, grads, cotangent


def layer_grads(task, params, inputs, cotangent, index):
  """Gradients `[1, ...]` of what is trained of one layer, and cotangents of its input."""

  def differentiate(cotangent):
    layer, x = take_layer(params, inputs, index)
    return _layer(task, layer, x, cotangent)

  def in_a_loop(cotangent):
    # Of one trip, which the compiler does not see through: all that reads the weights comes
    # before what overwrites them. Else the CPU's and the GPU's backends copy whole stacks; a TPU
    # needs no such help, and the loop would cost it another copy of a layer's gradient.
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(differentiate, cotangent)[0])
    trip = lambda _, made: differentiate(made[1])
    return lax.fori_loop(index, index + 1, trip, (zeros, cotangent))

  return lax.platform_dependent(cotangent, tpu=differentiate, default=in_a_loop)


def take_layer(params, inputs, index):
  """One layer's parameters `[1, ...]` and its input."""
  layer = slices.take(params[STACK], index)
  return layer, lax.dynamic_index_in_dim(inputs, index, keepdims=False)


def _layer(task, layer, x, cotangent):
  trained = weights.dense(weights.trained(layer))

  def one(part, index):
    x, cotangent = part
    seen = weights.in_part(layer, index)
    block = lambda trained, x: run_block(task, weights.replaced(seen, trained), x)
    _, pull_back = jax.vjp(block, trained, x)
    grads, cotangent = pull_back(cotangent)
    # Here and not after the loops around, so that each device sums up its own shard only.
    return task.lay_out({STACK: grads})[STACK], cotangent

  return accumulate(one, (x, cotangent), task.number, task.only)


def run_block(task, layer, x):
  """The block of one layer `[1, ...]`."""
  return task.model.block(jax.tree.map(lambda leaf: leaf[0], layer), x)


def embed_grads(task, params, cotangent):
  """Gradients of the embedding, as an input."""
  trained = weights.trained(params[EMBED])

  def one(part, _):
    tokens, cotangent = part
    embed = lambda table: task.model.embed({EMBED: weights.replaced(params[EMBED], table)}, tokens)
    _, pull_back = jax.vjp(embed, trained)
    return pull_back(cotangent)[0], None

  return accumulate(one, (task.batch['tokens'], cotangent), task.number)[0]
