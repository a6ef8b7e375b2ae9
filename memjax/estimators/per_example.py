"""Gradients of single examples with respect to one matrix of the last block: exact or estimated.

Shapes in this file: a batch of `B` sequences of `T` tokens, in `A` micro-batches; hidden width `D`;
`J` directions. The matrix is `[m, n]`, `d = m n` numbers: the second factor of an adapted weight,
`[r, n]`, or the weight itself.

Everything below the last block is a forward pass that nothing is kept of; then the last block and
the head run alone, for each direction twice, or once forwards and backwards.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memjax import weights
from memjax.estimators import noise
from memjax.naming import nearest, path_string


class Last(NamedTuple):
  """The loss of an example as a function of one matrix of the last block."""

  value: jax.Array  # f32[m, n].
  path: str  # Of the weight, for the address of its noise.
  inputs: Callable  # batch -> f32[B, T, D], what the last block is given.
  loss: Callable  # (value, one row of inputs, of targets, of weights) -> f32[], mean over tokens.


def gradients(
  model: Any, params: dict, batch: dict, *, leaf: str = 'attn/v/kernel', parts: int = 1
) -> jax.Array:
  """Returns the gradient of each example's mean loss: `f32[B, d]`.

  Memory beside the result: that of a forward pass of `B / A` sequences through all blocks but one;
  for the last, and the head, what their backward pass keeps. A token that does not count has no
  part in the mean, nor has the padding of others. Whatever dtype the model has, the last block and
  the head run in f32.

  Args:
    model: Has `embed`, `block` and `head_loss`, as `memjax.models.Llama`.
    params: Parameters; of an adapted weight the second factor is differentiated.
    batch: `tokens`, `targets`, `weights` `[B, T]`.
    leaf: Path of the weight in a block.
    parts: Micro-batches A, a divisor of B.

  Raises:
    ValueError: for a leaf that the blocks do not have, naming the nearest.
  """
  last = last_block(model, params, leaf)
  gradient = _each_row(jax.grad(last.loss))

  def differentiate(part):
    found = gradient(last.value, last.inputs(part), part['targets'], part['weights'])
    return found.reshape(found.shape[0], -1)

  return _in_parts(differentiate, batch, parts)


def estimates(
  model: Any,
  params: dict,
  batch: dict,
  *,
  root: jax.Array,
  draw: jax.Array | int,
  directions: int,
  eps: float = 1e-3,
  leaf: str = 'attn/v/kernel',
  parts: int = 1,
) -> jax.Array:
  """Returns zeroth-order estimates of the same: `f32[B, d]`.

  The mean over directions of slope times direction, without a backward pass. Its expectation is the
  gradient of an example; its squared error is `(d + 1) / J` times the gradient's squared norm. So a
  single direction says how long a gradient is and next to nothing about where it points: all
  examples then have the same direction. Distances between examples, which share directions, need
  fewer of them: some 64 for a rank correlation of 0.96 with the true ones.

  Memory beside the result: a forward pass of `B / A` sequences, and a direction. Time: `2 J` passes
  through the last block and the head.

  Args:
    model: As in `gradients`.
    params: Likewise.
    batch: Likewise.
    root: Root key of the directions.
    draw: Number of the draw: the step, for new directions every step.
    directions: J.
    eps: Half the distance between two values, in multiples of a direction.
    leaf: As in `gradients`.
    parts: Likewise.

  Raises:
    ValueError: as `gradients`, and for fewer than one direction.
  """
  last = last_block(model, params, leaf)
  found = slopes(last, batch, root, draw, directions, eps, parts)

  def add(total, indexed):
    index, slope = indexed
    direction = _direction(last, root, draw, index).reshape(1, -1)
    return total + slope[:, None] * direction, None

  zeros = jnp.zeros((found.shape[0], last.value.size), jnp.float32)
  total, _ = lax.scan(add, zeros, (jnp.arange(directions), found.T))
  return total / directions


def slopes(
  last: Last,
  batch: dict,
  root: jax.Array,
  draw: jax.Array | int,
  directions: int,
  eps: float,
  parts: int,
) -> jax.Array:
  """Returns the slope of each example's loss along each direction: `f32[B, J]`; as `estimates`."""
  if directions < 1:
    raise ValueError(f'directions is {directions}; an estimate takes at least one')

  losses = _each_row(last.loss)

  def measure(part):
    rows = last.inputs(part), part['targets'], part['weights']

    def slope(index):
      step = eps * _direction(last, root, draw, index)
      return (losses(last.value + step, *rows) - losses(last.value - step, *rows)) / (2 * eps)

    return lax.map(slope, jnp.arange(directions)).T

  return _in_parts(measure, batch, parts)


def last_block(model: Any, params: dict, leaf: str) -> Last:
  """Returns the last block of a model as a function of one of its weights; see `gradients`."""
  blocks = params['blocks']
  layers = jax.tree.leaves(blocks)[0].shape[0]
  # Layer by layer out of the stack: a slice of all but one would be a copy of the model.
  take = lambda index: jax.tree.map(
    lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), blocks
  )
  layer = take(layers - 1)
  weight = _find(layer, leaf)
  value, put = _trained_part(weight)
  alone = _alone(model)

  def inputs(batch):
    block = lambda x, index: (model.block(take(index), x), None)
    x = model.embed(params, batch['tokens'])
    return lax.scan(block, x, jnp.arange(layers - 1))[0].astype(jnp.float32)

  def loss(value, x, targets, counted):
    x = alone.block(_replace(layer, leaf.split('/'), put(value)), x[None])
    total, count = alone.head_loss(params, x, targets[None], counted[None])
    return total / jnp.maximum(count, 1)

  return Last(value.astype(jnp.float32), f'blocks/{leaf}', inputs, loss)


def _each_row(function):
  return jax.vmap(function, in_axes=(None, 0, 0, 0))


def _direction(last, root, draw, index):
  """Addressed like the noise of a layer, by its number among the directions."""
  key = noise.layer_keys(noise.address(root, draw, last.path), index[None])[0]
  return noise.gaussian.draw(key, last.value.shape)


def _in_parts(function, batch, parts):
  """Runs `function` on one micro-batch after the other; rows come back in their order."""
  if parts == 1:
    return function(batch)
  # Rows `i::A` are part `i`, so that every device keeps its own rows and nothing moves.
  cut = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
  found = lax.map(function, jax.tree.map(cut, batch))
  return found.swapaxes(0, 1).reshape(-1, *found.shape[2:])


def _alone(model):
  """The model for one example at a time, which `vmap` makes a batch of."""
  fields = {'activations': None, 'attention': 'xla'}
  known = {field.name for field in dataclasses.fields(model)}
  return dataclasses.replace(model, **{k: v for k, v in fields.items() if k in known})


def _trained_part(weight):
  """What is differentiated of a weight, and how it is put back."""
  parts = weights.trained(weight)
  if isinstance(parts, dict) and 'b' in parts:
    return parts['b'], lambda value: weights.replaced(weight, {'b': value})
  return weights.materialize(weight), lambda value: value


def _find(layer, leaf):
  named = jax.tree.leaves_with_path(layer, is_leaf=weights.is_weight)
  named = {path_string(path): weight for path, weight in named}
  if leaf not in named:
    raise ValueError(f'the blocks have no leaf {leaf!r}; {nearest(leaf, named)}')
  return named[leaf]


def _replace(tree, names, value):
  if not names:
    return value
  return {**tree, names[0]: _replace(tree[names[0]], names[1:], value)}
