"""Adafactor: a second moment of rows and columns.

Shapes in this file: a matrix leaf is `[..., m, n]`; leading axes are batch (scan-stacked layers,
experts), and every matrix has its own factors, its own clipping and its own scale.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms import explicit, units
from memjax.transforms import factors as factors_lib
from memjax.transforms.float32 import in_float32


class AdafactorState(NamedTuple):
  """State of `scale_by_adafactor`."""

  count: jax.Array  # i32[], updates seen so far.
  factors: factors_lib.Factors  # Of the squared gradient.


def scale_by_adafactor(
  *,
  decay_rate: float = 0.8,
  decay_offset: int = 0,
  min_dim_size_to_factor: int = 128,
  clipping_threshold: float | None = 1.0,
  eps: float = 1e-30,
) -> optax.GradientTransformation:
  r"""Rescales updates by a factored root mean square, and clips what that leaves too large.

  With :math:`\beta = 1 - t^{-0.8}` at update `t = 1, 2, ...`, rows :math:`R` and columns :math:`C`
  average the squared gradient of a matrix:

  .. math::
    R &\leftarrow \beta R + (1 - \beta) \, \mathrm{mean}_n(G^2 + \epsilon), \quad
    C \leftarrow \beta C + (1 - \beta) \, \mathrm{mean}_m(G^2 + \epsilon) \\
    U &= G \, (R \, C^T / \mathrm{mean}(R))^{-1/2}, \quad
    U \leftarrow U / \max(1, \mathrm{RMS}(U) / d)

  Where `optax.adafactor` takes the two largest axes of a leaf and clips a whole leaf at once, each
  matrix of a stack `[L, m, n]` is on its own here, as if it were a leaf, and state is f32 for every
  dtype. A stack of norms or biases `[L, n]`, known by name (`units.is_matrix`), is vectors.

  A matrix keeps `m + n` f32 numbers, any other leaf one a number. Sharded over m or n, an update
  communicates sums of rows or columns, never a matrix.

  Example:
    >>> state = scale_by_adafactor().init({'w': jnp.zeros([8, 128, 256])})
    >>> state.factors.v_row['w'].shape, state.factors.v_col['w'].shape
    ((8, 128, 1), (8, 1, 256))

  Args:
    decay_rate: The power of `t` in the decay.
    decay_offset: Updates to leave out of `t`, for a run that goes on from a checkpoint with its
      count; `t` is at least 1.
    min_dim_size_to_factor: A matrix with a shorter side is not factored; 1 factors all.
    clipping_threshold: Largest RMS `d` of a unit's update; None does not clip.
    eps: Added to the squared gradient.

  Returns:
    A transform with state `AdafactorState`; it does not read `params`.

  References:
    Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
    <https://arxiv.org/abs/1804.04235>`_, 2018
  """
  factored = functools.partial(factors_lib.is_factored, min_dim_size_to_factor)

  def init(params):
    return AdafactorState(jnp.zeros([], jnp.int32), factors_lib.init_factors(params, factored))

  def update(updates, state, params=None):
    del params
    return explicit.on_auto_axes(step, (updates, state), updates, state)

  def step(updates, state):
    count = optax.safe_increment(state.count)
    t = jnp.maximum(count - decay_offset, 1).astype(jnp.float32)
    decay = 1 - t**-decay_rate
    wide = jax.tree.map(factors_lib.widen, updates)
    factors = factors_lib.average(wide, state.factors, decay, eps)
    scaled = factors_lib.rescale(wide, factors, clipping_threshold)
    scaled = jax.tree.map(lambda u, g: u.astype(g.dtype), scaled, updates)
    return scaled, AdafactorState(count, factors)

  return optax.GradientTransformation(init, update)


def adafactor(
  learning_rate: optax.ScalarOrSchedule | None = None,
  *,
  decay_rate: float = 0.8,
  decay_offset: int = 0,
  min_dim_size_to_factor: int = 128,
  clipping_threshold: float | None = 1.0,
  multiply_by_parameter_scale: bool = True,
  momentum: float | None = None,
  weight_decay: float = 0.0,
  mask: Any = None,
  eps: float = 1e-30,
) -> optax.GradientTransformationExtraArgs:
  """Adafactor: `scale_by_adafactor`, parameter scale, momentum, decay, learning rate.

  Differs from `optax.adafactor` in that every matrix of a stack is on its own (see
  `scale_by_adafactor`), that weight decay is multiplied by the learning rate, that momentum
  averages updates before the learning rate, so that a schedule acts at once, and that no learning
  rate means the paper's.

  Example:
    >>> optimizer = adafactor()
    >>> loss = lambda params: jnp.mean(jnp.square(params['w']))
    >>> params = {'w': jnp.ones([4, 128, 256])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(f'{loss(params):.3f}')
    0.980
    0.961
    0.942

  Args:
    learning_rate: A number or an optax schedule; None takes `relative_step`, as the paper does.
      With `multiply_by_parameter_scale` it is relative to the size of the weights.
    decay_rate: As `scale_by_adafactor`.
    decay_offset: As `scale_by_adafactor`.
    min_dim_size_to_factor: As `scale_by_adafactor`.
    clipping_threshold: As `scale_by_adafactor`.
    multiply_by_parameter_scale: Whether the step is relative to the weights, see
      `scale_by_parameter_rms`.
    momentum: Decay of an average of the updates, which costs one f32 number a parameter; None has
      none.
    weight_decay: Decoupled decay, times the learning rate and not times the parameter scale.
    mask: Leaves to decay, as in `optax.adamw`.
    eps: As `scale_by_adafactor`.

  Returns:
    A transform that yields updates to be added to the parameters, and needs `params` for the
    parameter scale and for the decay.
  """
  steps = [
    scale_by_adafactor(
      decay_rate=decay_rate,
      decay_offset=decay_offset,
      min_dim_size_to_factor=min_dim_size_to_factor,
      clipping_threshold=clipping_threshold,
      eps=eps,
    )
  ]
  if multiply_by_parameter_scale:
    steps.append(scale_by_parameter_rms())
  if momentum is not None:
    steps.append(optax.ema(momentum, debias=False))
  steps.append(optax.add_decayed_weights(weight_decay, mask))
  steps.append(
    optax.scale_by_learning_rate(relative_step() if learning_rate is None else learning_rate)
  )
  return in_float32(optax.chain(*steps))


def relative_step(largest: float = 1e-2) -> optax.Schedule:
  """The learning rate of the Adafactor paper: the inverse root of the update, `largest` at most.

  >>> schedule = relative_step()
  >>> f'{schedule(0):.4f} {schedule(39_999):.4f}'
  '0.0100 0.0050'
  """
  return lambda count: jnp.minimum(largest, jax.lax.rsqrt(jnp.asarray(count + 1.0)))


def scale_by_parameter_rms(floor: float = 1e-3) -> optax.GradientTransformation:
  """Multiplies each unit's update by the root mean square of its weights, `floor` at least.

  `optax.scale_by_param_block_rms` for stacks: every matrix has its own scale. Communicates one
  number a unit.
  """

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('the step is relative to the weights: call update(updates, state, params)')
    return explicit.on_auto_axes(step, updates, updates, params), state

  def step(updates, params):
    return units.map_with_path(
      lambda path, u, p: (u * jnp.maximum(units.unit_rms(path, p), floor)).astype(u.dtype),
      updates,
      params,
    )

  return optax.GradientTransformation(optax.init_empty_state, update)
