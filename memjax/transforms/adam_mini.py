"""Adam-mini: Adam with one second moment a block of parameters.

Shapes in this file: a leaf of any shape is cut into equal blocks, such as the columns of a kernel
`[..., in, out]`. A second moment has its leaf's axes, each as long as the leaf has blocks along it,
so that the parameter's sharding is its own; leading axes are batch and never averaged over.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms import explicit, units
from memjax.transforms.bias import bias
from memjax.transforms.float32 import in_float32

# (slash path, leaf) -> shape of one block: as many sizes as the leaf has axes, each a divisor.
Partition = Callable[[str, Any], tuple[int, ...]]

_TOKENS = re.compile(r'embed|embd|^wte$', re.IGNORECASE)
_QUERY_KEY = re.compile(r'^(q|k|query|key|q_proj|k_proj|wq|wk)$', re.IGNORECASE)
_BIAS = re.compile(r'bias|^b$', re.IGNORECASE)
_FIRST_FACTOR = re.compile(r'kernel(/adapted)?/a$')  # [..., in, r]: its columns are ranks.


class AdamMiniState(NamedTuple):
  """State of `scale_by_adam_mini`."""

  count: jax.Array  # i32[], updates seen so far.
  mu: optax.Updates  # The leaf's shape, f32.
  nu: optax.Updates  # Blocks along each of the leaf's axes, f32.


def transformer_blocks(head_dim: int | None = None) -> Partition:
  """The blocks of the Adam-mini paper, for Flax kernels `[..., in, out]`.

  By the names in a path: a head of a query or key kernel is a block; of an embedding `[tokens, D]`
  a token; of a bias a number; of a norm all of it; of any other matrix (values, attention output,
  MLP, language-model head) an output neuron, `in` numbers. Of an adapted kernel the second factor
  has the kernel's heads, the first one neurons. A kernel that splits its heads, `[D, heads,
  head_dim]`, needs a partition of its own.

  >>> blocks = transformer_blocks(head_dim=64)
  >>> blocks('blocks/attn/q/kernel', jnp.zeros([8, 512, 512]))
  (1, 512, 64)
  >>> blocks('blocks/mlp/up/kernel', jnp.zeros([8, 512, 1376]))
  (1, 512, 1)
  >>> blocks('embed/embedding', jnp.zeros([32000, 512]))
  (1, 512)

  Args:
    head_dim: Width of an attention head; None if there is no attention.

  Raises:
    ValueError: from the partition, for a query or key kernel whose columns are no heads.
  """

  def partition(path, leaf):
    parts = units.adapted_path(path).split('/')
    says = lambda pattern: any(pattern.search(part) for part in parts)
    ones = (1,) * leaf.ndim
    if not units.is_matrix(path, leaf):
      return ones if says(_BIAS) or not leaf.ndim else (*ones[1:], leaf.shape[-1])
    rows, columns = leaf.shape[-2:]
    if says(_TOKENS):
      return (*ones[2:], 1, columns)
    if not says(_QUERY_KEY) or _FIRST_FACTOR.search(path):
      return (*ones[2:], rows, 1)
    if head_dim is None or columns % head_dim:
      raise ValueError(
        f'{path}: shape {tuple(leaf.shape)} does not divide into heads with head_dim={head_dim}; '
        'pass the width of a head, or blocks of your own as `partition`'
      )
    return (*ones[2:], rows, head_dim)

  return partition


def scale_by_adam_mini(
  b1: float = 0.9,
  b2: float = 0.999,
  *,
  eps: float = 1e-8,
  head_dim: int | None = None,
  partition: Partition | None = None,
) -> optax.GradientTransformation:
  r"""Rescales updates by Adam with the mean square of each block for its second moment.

  .. math::
    m \leftarrow b_1 m + (1 - b_1) g, \quad
    v \leftarrow b_2 v + (1 - b_2) \, \mathrm{mean}_{block}(g^2), \quad
    u = \hat{m} / (\sqrt{\hat{v}} + \epsilon)

  with both moments corrected for their start at zero. Blocks of one number are Adam.

  A leaf keeps one f32 number a parameter and one a block: `m n + n` for a matrix, half of what
  Adam keeps. Sharded over the axes of its blocks, a leaf's update communicates sums of blocks.

  Example:
    >>> params = {'q': jnp.zeros([8, 16, 12]), 'mlp': jnp.zeros([8, 16, 20])}
    >>> state = scale_by_adam_mini(head_dim=4).init(params)
    >>> jax.tree.map(jnp.shape, state.nu)
    {'mlp': (8, 1, 20), 'q': (8, 1, 3)}

  Args:
    b1: Decay rate of the first moment.
    b2: Decay rate of the second moment.
    eps: Added to the root of the second moment, after bias correction.
    head_dim: Width of an attention head, for `transformer_blocks`.
    partition: Function of (path, leaf) that returns the shape of one block, instead of
      `transformer_blocks(head_dim)`.

  Returns:
    A transform with state `AdamMiniState`; it does not read `params`.

  Raises:
    ValueError: here if both `head_dim` and `partition` are given; at `init` for blocks that do not
      fit, naming the leaf.

  References:
    Zhang et al., `Adam-mini: Use Fewer Learning Rates To Gain More
    <https://arxiv.org/abs/2406.16793>`_, 2024
  """
  if partition is not None and head_dim is not None:
    raise ValueError('head_dim belongs to the default blocks; give it or `partition`, not both')
  partition = transformer_blocks(head_dim) if partition is None else partition

  def init(params):
    blocks = units.map_with_path(lambda path, p: _check(path, p, partition(path, p)), params)
    return AdamMiniState(
      count=jnp.zeros([], jnp.int32),
      mu=jax.tree.map(units.zeros, params),
      nu=jax.tree.map(lambda p, b: units.zeros(p, map(_quotient, p.shape, b)), params, blocks),
    )

  def update(updates, state, params=None):
    del params
    return explicit.on_auto_axes(step, (updates, state), updates, state)

  def step(updates, state):
    count = optax.safe_increment(state.count)
    mean = lambda g, v: _block_mean(jnp.square(g.astype(v.dtype)), v.shape)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * mean(g, v), state.nu, updates)
    first, second = bias(b1, count), bias(b2, count)
    scaled = jax.tree.map(
      lambda m, v, g: (m * _spread(1 / (first * (jnp.sqrt(v / second) + eps)), m.shape)).astype(
        g.dtype
      ),
      mu,
      nu,
      updates,
    )
    return scaled, AdamMiniState(count, mu, nu)

  return optax.GradientTransformation(init, update)


def adam_mini(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  *,
  eps: float = 1e-8,
  head_dim: int | None = None,
  partition: Partition | None = None,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Adam-mini with decoupled weight decay: `scale_by_adam_mini`, decay, learning rate.

  Example:
    >>> optimizer = adam_mini(learning_rate=0.01)
    >>> loss = lambda params: jnp.mean(jnp.square(params['w']))
    >>> params = {'w': jnp.ones([16, 24])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(f'{loss(params):.3f}')
    0.980
    0.960
    0.941

  Args:
    learning_rate: A number or an optax schedule; AdamW's.
    b1: As `scale_by_adam_mini`.
    b2: As `scale_by_adam_mini`.
    eps: As `scale_by_adam_mini`.
    head_dim: As `scale_by_adam_mini`.
    partition: As `scale_by_adam_mini`.
    weight_decay: Decoupled decay, times the learning rate.
    mask: Leaves to decay, as in `optax.adamw`.

  Returns:
    A transform that yields updates to be added to the parameters.

  Raises:
    ValueError: as `scale_by_adam_mini`.
  """
  steps = optax.chain(
    scale_by_adam_mini(b1, b2, eps=eps, head_dim=head_dim, partition=partition),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  return in_float32(steps)


def _check(path, leaf, block):
  if len(block) != leaf.ndim or any(b < 1 or size % b for size, b in zip(leaf.shape, block)):
    raise ValueError(
      f'{path}: shape {tuple(leaf.shape)} does not divide into blocks of shape {tuple(block)}; '
      'a partition returns a divisor for every axis'
    )
  return _Block(block)


class _Block(tuple):
  """A shape that `jax.tree` takes for a leaf."""


def _quotient(size, block):
  return size // block


def _block_mean(x, blocks):
  """Means of equal blocks, `blocks` of them along each axis."""
  # Whole axes first: what is left is too small for its cutting to cost a resharded matrix.
  whole = tuple(axis for axis, count in enumerate(blocks) if count == 1)
  x = jnp.mean(x, axis=whole, keepdims=True)
  cut = [n for count, size in zip(blocks, x.shape) for n in (count, size // count)]
  return jnp.mean(x.reshape(cut), axis=tuple(range(1, len(cut), 2)))


def _spread(x, shape):
  """Repeats the blocks' numbers until they broadcast to `shape`."""
  for axis, (count, size) in enumerate(zip(x.shape, shape)):
    if 1 < count < size:
      x = jnp.repeat(x, size // count, axis)
  return x
