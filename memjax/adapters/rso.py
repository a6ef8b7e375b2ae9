"""Random subspace optimisation: Adam within a subspace that is drawn anew, then another.

Shapes in this file: a matrix is `W[m, n]`, its subspace `P[m, r]`, what is trained `B[r, n]`;
stacked leaves have an axis of layers in front.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memjax import weights
from memjax.adapters import state as state_lib
from memjax.adapters.merge import renewed
from memjax.adapters.noise import layer_keys
from memjax.naming import path_string


@dataclasses.dataclass(frozen=True)
class RSO:
  r"""`W + P B`, of which B is trained; every so often `P B` joins W and another P is drawn.

  .. math::
    B_k \approx \arg\min_B f(W_k + P_k B) + \frac{1}{2 \eta} \|B\|^2, \quad
    W_{k+1} = W_k + P_k B_k, \quad P_k \sim \mathcal{N}(0, 1/r)

  The gradient of B is `(x P)' dY`, so that `x P`, r numbers a token, is kept for it in place of x,
  and `r n` numbers are reduced over devices in place of `m n`. P is drawn again wherever it is
  used, from a key of its matrix and its period. State is `3 r n` numbers a matrix with Adam, B
  included, and n is the side of the outputs whichever is shorter.

  Each period begins with B zero and an optimizer without memory, since moments of one subspace mean
  nothing in the next: use `vector_adam`, which counts updates of each B from there on, and whose
  argument `eta` is the proximal term. Under Adam the steps of `P B` are of the size of the learning
  rate whatever the rank.

  Attributes:
    rank: r. At the shorter side of a matrix nothing is saved: leave that out of `targets`, and it
      is trained in full.
    every: Updates within one subspace.
    targets: Regular expression searched in leaf paths; '' the layers' matrices.
    rest: Likewise, of what is trained in full; the default is everything else.
    dtype: Of B; '' is that of the matrix.

  References:
    Chen et al., `A Memory Efficient Randomized Subspace Optimization Method for Training Large
    Language Models <https://arxiv.org/abs/2502.07222>`_, 2025 (which prints neither the length of
    a period nor `eta`, and has no public code)
  """

  rank: int
  every: int = 200
  targets: str = ''
  rest: str = '.*'
  dtype: str = ''

  def __post_init__(self):
    if self.every < 1:
      raise ValueError(f'every is {self.every}; a subspace lasts at least one update')

  def adapt(self, matrix: Any, key: jax.Array) -> weights.Restarted:
    """Returns the leaf of a matrix `[m, n]`, in its first subspace."""
    shape = weights.whole(matrix)
    m, n = shape.shape
    subspace = weights.Drawn(jax.random.key_data(key), (m, self.rank), 1 / math.sqrt(self.rank))
    return weights.Restarted(
      matrix, subspace, jnp.zeros((self.rank, n), jnp.dtype(self.dtype or shape.dtype))
    )

  def due(self, step: jax.Array) -> jax.Array:
    """Whether to restart before the update that follows `step` finished ones."""
    return (step > 0) & (step % self.every == 0)

  def restart(self, state: dict, key: jax.Array, init: Callable) -> dict:
    """Returns the training state, in a new subspace if a period is over.

    Args:
      state: Training state.
      key: Root key of the subspaces and of the rounding of W.
      init: Of the optimizer.
    """
    due = self.due(state['step'])
    key = jax.random.fold_in(key, state['step'])
    named = jax.tree.leaves_with_path(state['params'], is_leaf=weights.is_weight)
    own = {path_string(path): leaf for path, leaf in named if isinstance(leaf, weights.Adapted)}
    where = {f'{path}/b': due for path in own}

    own = renewed(own, _renewed, key, due)
    put = lambda path, leaf: own.get(path_string(path), leaf)
    params = jax.tree.map_with_path(put, state['params'], is_leaf=weights.is_weight)
    opt = state_lib.restarted(state['opt'], state_lib.fresh(init, params), where)
    return {**state, 'params': params, 'opt': opt}


def _renewed(leaf, key):
  """The leaf in another subspace of the same law; one that is not drawn stays."""
  a = leaf.a
  if isinstance(a, weights.Drawn):
    a = dataclasses.replace(a, key=layer_keys(key, a.key.shape[:-1]))
  return dataclasses.replace(leaf, a=a, b=jnp.zeros_like(leaf.b))
