"""Muon: momentum whose singular values are all made about 1.

Shapes in this file: a matrix leaf is `[..., m, n]`; leading axes are batch (scan-stacked layers,
experts), and every matrix is orthogonalised on its own.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memjax.transforms import explicit, units
from memjax.transforms.float32 import in_float32
from memjax.transforms.targets import Targets, default_targets

# x -> a x + b x^3 + c x^5 drives singular values of 0.01 to 1 between 0.7 and 1.2 in five rounds.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
  """State of `scale_by_muon`."""

  count: jax.Array  # i32[], updates seen so far.
  mu: optax.Updates  # [..., m, n] f32.


def scale_by_muon(
  b1: float = 0.95,
  *,
  nesterov: bool = True,
  newton_schulz_steps: int = 5,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  r"""Replaces the momentum of every matrix by the orthogonal matrix nearest to it, about.

  With momentum `M` corrected for its start at zero, :math:`M = U S V^T`, the update is about
  :math:`U V^T \sqrt{\max(1, n / m)}`: `optax.contrib.scale_by_muon` and its factor of the shape,
  on every matrix of a stack. All leaves must be matrices; `muon` gives the others to Adam.

  A matrix keeps `m n` f32 numbers. Orthogonalising takes `newton_schulz_steps` times `2 a^2 (a + 2
  c)` flops for sides `a <= c`. It is a product of whole matrices: sharded over m or n, it gathers
  them, which no other transform here does, but one at a time, so that a device holds a few `[m, n]`
  and not a stack of them.

  Example:
    >>> transform = scale_by_muon()
    >>> gradient = {'w': jnp.arange(24.0).reshape(2, 3, 4) ** 2}
    >>> updates, _ = transform.update(gradient, transform.init(gradient))
    >>> f'{jnp.linalg.norm(updates["w"][1], ord=2):.1f}'
    '0.8'

  Args:
    b1: Decay rate of the momentum.
    nesterov: Whether the momentum looks one gradient ahead.
    newton_schulz_steps: Rounds of the iteration.
    eps: Added to the Frobenius norm that the iteration starts from.

  Returns:
    A transform with state `MuonState`; it does not read `params`.

  Raises:
    ValueError: at `init` for a leaf that is no matrix, naming it.

  References:
    Jordan et al., `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon>`_, 2024
  """

  def init(params):
    units.map_with_path(_check, params)
    return MuonState(jnp.zeros([], jnp.int32), jax.tree.map(units.zeros, params))

  def update(updates, state, params=None):
    del params
    return explicit.on_auto_axes(step, (updates, state), updates, state)

  def step(updates, state):
    count = optax.safe_increment(state.count)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
    now, ahead = 1 - b1**count, 1 - b1 ** (count + 1)

    def direction(m, g):
      m = b1 * m / ahead + (1 - b1) * g.astype(m.dtype) / now if nesterov else m / now
      rows, columns = g.shape[-2:]
      size = max(1, columns / rows) ** 0.5
      return (size * orthogonalize(m, newton_schulz_steps, eps)).astype(g.dtype)

    return jax.tree.map(direction, mu, updates), MuonState(count, mu)

  return optax.GradientTransformation(init, update)


def muon(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.95,
  *,
  nesterov: bool = True,
  newton_schulz_steps: int = 5,
  eps: float = 1e-8,
  targets: Targets = None,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  adam_b1: float = 0.9,
  adam_b2: float = 0.999,
  weight_decay: float = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Muon on the layers' matrices, Adam on everything else, with decoupled weight decay.

  `optax.contrib.muon` takes leaves with two axes for its matrices, whatever they are: a stack of
  kernels `[L, m, n]` goes to Adam there, and a stack of norms `[L, n]` is orthogonalised.

  Example:
    >>> optimizer = muon(learning_rate=0.02)
    >>> loss = lambda params: jnp.mean(jnp.square(params['w'])) + params['bias'] ** 2
    >>> params = {'w': jnp.eye(16), 'bias': jnp.ones([])}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(f'{loss(params):.3f}')
    1.003
    0.957
    0.915

  Args:
    learning_rate: A number or an optax schedule.
    b1: As `scale_by_muon`.
    nesterov: As `scale_by_muon`; Adam's too.
    newton_schulz_steps: As `scale_by_muon`.
    eps: As `scale_by_muon`; Adam's too.
    targets: Leaves for Muon, as in `project`; `default_targets` if None.
    adam_learning_rate: Of the other leaves; None takes `learning_rate`.
    adam_b1: Decay rate of Adam's first moment.
    adam_b2: Decay rate of Adam's second moment.
    weight_decay: Decoupled decay of all leaves, times their learning rate.
    mask: Leaves to decay, as in `optax.adamw`.

  Returns:
    A transform that yields updates to be added to the parameters.

  Raises:
    ValueError: as `scale_by_muon`, and for `targets` that match nothing.
  """
  other_rate = learning_rate if adam_learning_rate is None else adam_learning_rate
  matrices = optax.chain(
    scale_by_muon(b1, nesterov=nesterov, newton_schulz_steps=newton_schulz_steps, eps=eps),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  others = optax.adamw(
    other_rate, adam_b1, adam_b2, eps, weight_decay=weight_decay, mask=mask, nesterov=nesterov
  )
  return in_float32(optax.partition({'muon': matrices, 'adam': others}, _labels(targets)))


def orthogonalize(x: jax.Array, steps: int = 5, eps: float = 1e-8) -> jax.Array:
  """Newton-Schulz iteration towards the `U V^T` of every matrix `[..., m, n]`.

  The singular values of the result lie between about 0.7 and 1.2; it converges no further.
  """
  # One matrix after another: on a mesh the products gather their operands.
  one = lambda matrix: _newton_schulz(matrix, steps, eps)
  return jax.lax.map(one, x.reshape(-1, *x.shape[-2:])).reshape(x.shape)


def _newton_schulz(x, steps, eps):
  a, b, c = COEFFICIENTS
  tall = x.shape[0] > x.shape[1]
  x = x.T if tall else x  # The products are of the shorter side.
  x = x / (jnp.linalg.norm(x) + eps)
  for _ in range(steps):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x.T if tall else x


def _labels(targets):
  def label(params):
    labels = units.map_with_path(lambda path, p: 'muon' if chosen(path, p) else 'adam', params)
    if 'muon' not in jax.tree.leaves(labels):
      raise ValueError('no leaf is for Muon; choose matrices with `targets`, or use optax.adamw')
    return labels

  if targets is None:
    chosen = default_targets
  elif callable(targets):
    chosen = targets
  else:
    chosen = lambda path, _: re.search(targets, path) is not None
  return label


def _check(path, leaf):
  if not units.is_matrix(path, leaf):
    raise ValueError(
      f'{path}: shape {tuple(leaf.shape)} is no matrix to orthogonalise; give such leaves to '
      'another transform with optax.partition, as `muon` does'
    )
