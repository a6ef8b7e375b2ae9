"""Training on a chosen part of each batch.

Shapes in this file: a pool of `B` sequences of `T` tokens, of which a step trains on `K`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from memjax.data.coreset import check_keep


class Rows(NamedTuple):
  """What a selector chose."""

  rows: jax.Array  # i32[K], distinct, ascending.
  weights: jax.Array | None  # f32[K], of an example's tokens in the loss; None for 1.


class Selector(NamedTuple):
  """How rows are chosen: two pure functions, like an optax transform's."""

  # params -> state; None for none.
  init: Callable[[Any], Any]
  # (state, {'step', 'params', ...}, pool) -> (Rows, state, metrics).
  choose: Callable[[Any, dict, dict], tuple[Rows, Any, dict]]


def selected(
  step: Callable, selector: Selector | None, layout: NamedSharding | None = None
) -> Callable[[dict, dict], tuple[dict, dict]]:
  """Returns `step(state, pool) -> (state, metrics)` that trains on the rows a selector chooses.

  Any step will do. The state has a field more, `select`, the selector's own, see `init_state`; so
  it is in checkpoints, and a resumed run chooses the same rows. All in one program: the memory is
  that of a step on K rows, or of choosing them, whichever is more. Under a mesh rows are chosen
  from the pool of all devices and spread over them again; the tokens of the pool are gathered for
  that, `12 B T` bytes.

  Args:
    step: `step(state, batch) -> (state, metrics)`.
    selector: Such as `memjax.steps.colm.colm`; None returns the step as it is.
    layout: Sharding of what has the batch as its first axis; None leaves it to the compiler.
  """
  if selector is None:
    return step

  def wrapped(state, pool):
    inner = {name: part for name, part in state.items() if name != 'select'}
    chosen, select, found = selector.choose(state.get('select'), inner, pool)
    # All of it now: what the new state of the selector needs would else be kept through the step.
    chosen, select, found = jax.lax.optimization_barrier((chosen, select, found))
    after, metrics = step(inner, take_rows(pool, chosen, layout))
    return _joined(after, select), metrics | found

  return wrapped


def init_state(state: dict, selector: Selector | None) -> dict:
  """Returns a training state with that of a selector, if it has any."""
  return state if selector is None else _joined(state, selector.init(state['params']))


def _joined(state, select):
  return state if select is None else state | {'select': select}


def take_rows(pool: dict, chosen: Rows, layout: NamedSharding | None = None) -> dict:
  """Returns the chosen rows of a pool as a batch; what `selected` trains on.

  Args:
    pool: Dict of arrays `[B, ...]`; `source`, which says where rows are from, is left out.
    chosen: Rows, and what their tokens count.
    layout: As in `selected`.
  """
  batch = {name: jnp.take(x, chosen.rows, axis=0) for name, x in pool.items() if name != 'source'}
  if chosen.weights is not None:
    batch['weights'] = batch['weights'] * chosen.weights[:, None]
  return batch if layout is None else jax.lax.with_sharding_constraint(batch, layout)


def random_rows(keep: int, key: jax.Array) -> Selector:
  """Chooses `keep` rows at random: what any other selector has to beat.

  Args:
    keep: K.
    key: Root key; the draw of a step has an address.

  Raises:
    ValueError: when the step is traced, for more rows than the pool has.
  """

  def choose(state, training, pool):
    size = pool['tokens'].shape[0]
    check_keep(keep, size)
    order = jax.random.permutation(jax.random.fold_in(key, training['step']), size)
    return Rows(jnp.sort(order[:keep]).astype(jnp.int32), None), state, {}

  return Selector(lambda params: None, choose)
