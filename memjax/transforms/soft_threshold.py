"""The proximal step of an absolute value, after any update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SoftThresholdState(NamedTuple):
  """State of `soft_threshold`."""

  count: jax.Array  # i32[], updates seen so far.


def soft_threshold(learning_rate: Any, penalty: float) -> optax.GradientTransformation:
  r"""Sends parameters towards zero by `learning_rate * penalty`, and those within that to zero.

  .. math::
    p \leftarrow \mathrm{sign}(p + u) \max(|p + u| - \eta \lambda, 0)

  Comes last in a chain, since it must see the update `u` that would be added. With descent before
  it, that is proximal gradient descent of the loss plus :math:`\lambda |p|_1`. Keeps a count.

  Args:
    learning_rate: Eta, a number or a schedule of the update count: that of the chain.
    penalty: Lambda.

  Returns:
    A transform that needs parameters.

  >>> import jax.numpy as jnp
  >>> transform = soft_threshold(1.0, 0.1)
  >>> gates = jnp.array([0.05, 0.2, -0.15])
  >>> updates, _ = transform.update(jnp.zeros(3), transform.init(gates), gates)
  >>> [round(float(x), 3) for x in gates + updates]
  [0.0, 0.1, -0.05]
  """

  def init(params):
    del params
    return SoftThresholdState(jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('soft_threshold needs the parameters that the updates are added to')
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    limit = jnp.asarray(rate * penalty, jnp.float32)

    def shrink(u, p):
      old = p.astype(jnp.float32)
      new = old + u.astype(jnp.float32)
      new = jnp.sign(new) * jnp.maximum(jnp.abs(new) - limit, 0)
      return (new - old).astype(u.dtype)

    return jax.tree.map(shrink, updates, params), SoftThresholdState(state.count + 1)

  return optax.GradientTransformation(init, update)
