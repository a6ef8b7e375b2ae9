"""The gates' threshold of `TsinghuaC3I/SoRA`."""

import jax
import jax.numpy as jnp
import optax


def sora_threshold(sparse_lambda_2: float) -> optax.GradientTransformation:
  """What `SparseAdamW` of the official SoRA does to gates after a step, last in a chain.

  Reproduced:
    - The threshold is not multiplied by the learning rate.
    - Numbers are moved towards zero first, and those that are then below the threshold become zero:
      all under twice the threshold, except those at the threshold, which stay.

  Left out: the penalty on the gates' mean absolute value that the scripts add to the loss.

  Args:
    sparse_lambda_2: The threshold.

  >>> gates = jnp.array([0.05, 0.15, 0.25, -0.3])
  >>> transform = sora_threshold(0.1)
  >>> updates, _ = transform.update(jnp.zeros(4), transform.init(gates), gates)
  >>> [round(float(x), 3) for x in gates + updates]
  [0.0, 0.0, 0.15, -0.2]
  """
  limit = sparse_lambda_2

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('sora_threshold needs the parameters that the updates are added to')

    def shrink(u, p):
      new = p + u
      new = jnp.where(new > limit, new - limit, new)
      new = jnp.where(new < -limit, new + limit, new)
      return jnp.where(jnp.abs(new) < limit, 0, new) - p

    return jax.tree.map(shrink, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
