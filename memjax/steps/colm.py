"""CoLM: trains on the examples of a large batch that stand for all of it.

Shapes in this file: of a pool of `B` examples from `S` sources, `K` are chosen. Features of an
example are `d` numbers, one for each of a matrix of the last block; `h` of them are compared.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from memjax import adapters
from memjax.data import coreset
from memjax.estimators import per_example
from memjax.naming import nearest
from memjax.steps.selected import Rows, Selector

FEATURES = ('exact', 'zeroth_order')


class CoLMState(NamedTuple):
  """What is remembered from pool to pool; the same on all devices."""

  count: jax.Array  # i32[], pools so far.
  mu: jax.Array  # f32[d], running mean of features of chosen examples.
  nu: jax.Array  # f32[d], running mean of their squares.
  seen: jax.Array  # i32[S], examples so far of each source.


def colm(
  model: Any,
  keep: int,
  *,
  key: jax.Array,
  features: str = 'exact',
  directions: int = 64,
  redraw: bool = True,
  coordinates: int = 2560,
  budgets: str = 'proportional',
  sources: int = 16,
  keep_sources: str | Sequence[int] = 'small',
  weighted: bool = False,
  leaf: str = 'attn/v/kernel',
  parts: int = 1,
  nan_similarity: float | None = None,
  eps: float = 1e-3,
  b1: float = 0.9,
  b2: float = 0.999,
  adam_eps: float = 1e-8,
) -> Selector:
  """Chooses all examples of small sources, and of each other source the medoids of its gradients.

  The feature of an example is its gradient for the last block's value projection (the second factor
  of its adapter, where it has one), divided as Adam would: moments run over the chosen examples of
  all pools. A source's examples are compared by the L1 distance over the coordinates with its
  largest means, and chosen by a greedy facility location; see `memjax.data.coreset.choose`.

  Memory beside that of a step on K rows: `2 d + S` numbers of state; while it chooses, `2 B d`
  numbers, what a forward pass of `B / parts` sequences takes, and the backward pass of one block.
  Communicates, under a mesh, a sum over each source, `S d` numbers, and what is compared, `B h`.

  Args:
    model: As `memjax.models.Llama`.
    keep: K.
    key: Root key of the directions; each has an address.
    features: 'exact' takes the gradients, which costs one block and the head forwards and
      backwards; 'zeroth_order' estimates them from values alone, which costs these twice a
      direction, and loses much of what exact ones say: see
      `memjax.estimators.per_example.estimates`.
    directions: Of the estimates, shared by all examples.
    redraw: Whether every pool has new directions.
    coordinates: h.
    budgets: How many of each source: 'proportional', 'balanced' or 'none', which is not by source.
    sources: S; `source` in a batch is below it.
    keep_sources: Numbers of the sources of which all examples are kept, or 'small': those with less
      than an even share of the examples so far.
    weighted: Whether a medoid counts as often as it is the nearest. The authors found it worse.
    leaf: Path in a block of the weight whose gradients are compared.
    parts: Micro-batches of the forward pass.
    nan_similarity: See `memjax.data.coreset.choose`.
    eps: Size of the perturbation of an estimate.
    b1: Decay of `mu`.
    b2: Decay of `nu`.
    adam_eps: Added to the square root of `nu`.

  Raises:
    ValueError: for an argument out of range.

  References:
    Nguyen et al., `Mini-batch Coresets for Memory-efficient Language Model Training on Data
    Mixtures <https://arxiv.org/abs/2407.19580>`_, 2025
  """
  if features not in FEATURES:
    raise ValueError(f'no features are called {features!r}; {nearest(features, FEATURES)}')
  if budgets not in coreset.BUDGETS:
    raise ValueError(f'no budgets are called {budgets!r}; {nearest(budgets, coreset.BUDGETS)}')
  fixed = _fixed_small(keep_sources, sources)

  def init(params):
    shape = jax.eval_shape(lambda p: per_example.last_block(model, p, leaf).value, params)
    zeros = jnp.zeros(shape.size, jnp.float32)
    return CoLMState(jnp.int32(0), zeros, zeros, jnp.zeros(sources, jnp.int32))

  def measure(state, params, pool):
    where = dict(leaf=leaf, parts=parts)
    if features == 'exact':
      return per_example.gradients(model, params, pool, **where)
    draw = state.count if redraw else 0
    how = dict(root=key, draw=draw, directions=directions, eps=eps)
    return per_example.estimates(model, params, pool, **how, **where)

  def choose(state, training, pool):
    source = _check_source(pool)
    params = adapters.at_rest(training['params'])
    found = jax.lax.stop_gradient(measure(state, params, pool))
    seen = state.seen + jnp.bincount(source, length=sources).astype(jnp.int32)
    small = coreset.small_sources(seen) if fixed is None else jnp.asarray(fixed)
    chosen = coreset.choose(
      _normalised(found, state, b1, b2, adam_eps),
      source,
      keep,
      small,
      coordinates=coordinates,
      budgets=budgets,
      nan_similarity=nan_similarity,
      everywhere=_everywhere(model),
    )
    mu, nu = _advance(found, chosen.medoids, state, b1, b2)
    rows = Rows(chosen.rows, chosen.weights if weighted else None)
    metrics = {'select/small': jnp.sum(small[source][chosen.rows]).astype(jnp.float32)}
    return rows, CoLMState(state.count + 1, mu, nu, seen), metrics

  return Selector(init, choose)


def _normalised(found, state, b1, b2, eps):
  """What Adam's update would be if an example's gradient came next: f32[B, d]."""
  finished = (state.count + 1).astype(jnp.float32)
  mu = b1 * state.mu[None] + (1 - b1) * found
  nu = b2 * state.nu[None] + (1 - b2) * found**2
  return (mu / (1 - b1**finished)) / (jnp.sqrt(nu / (1 - b2**finished)) + eps)


def _advance(found, medoids, state, b1, b2):
  """Moments after the chosen examples; small sources, always kept, have no part in them."""
  share = medoids.astype(jnp.float32)[:, None] / jnp.maximum(jnp.sum(medoids), 1)
  # Not a product with zeros: an example that is not finite is not chosen.
  mean = lambda x: jnp.sum(jnp.where(medoids[:, None], share * x, 0), axis=0)
  any_chosen = jnp.any(medoids)
  mu = b1 * state.mu + (1 - b1) * mean(found)
  nu = b2 * state.nu + (1 - b2) * mean(found**2)
  return jnp.where(any_chosen, mu, state.mu), jnp.where(any_chosen, nu, state.nu)


def _everywhere(model):
  """Puts what is compared on all devices of the model's mesh."""
  layout = getattr(model, 'activations', None)
  if not isinstance(layout, NamedSharding):
    return lambda x: x
  whole = NamedSharding(layout.mesh, PartitionSpec())
  return lambda x: jax.lax.with_sharding_constraint(x, whole)


def _fixed_small(keep_sources, sources):
  if keep_sources == 'small':
    return None
  if isinstance(keep_sources, str):
    raise ValueError(f"keep_sources is {keep_sources!r}; give 'small', or the numbers of sources")
  for number in keep_sources:
    if not 0 <= number < sources:
      raise ValueError(f'keep_sources has {number}, but sources are numbered below {sources}')
  return np.isin(np.arange(sources), keep_sources)


def _check_source(pool):
  if 'source' not in pool:
    raise ValueError(
      f'a batch has {", ".join(sorted(pool))}, but no source, i32[B]: where each sequence is from'
    )
  return pool['source']
