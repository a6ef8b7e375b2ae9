"""What a method does between two updates: new noise, a merge, a switch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from memjax.naming import fold_in_path


def over_time(
  step: Callable,
  spec: Any,
  key: jax.Array,
  init: Callable | Mapping | None = None,
  restart: Callable | None = None,
) -> Callable:
  """Returns a training step that first lets the method act on the state.

  Any step will do. A specification may have any of these methods:

  - `advance(state, key) -> state` gives the leaves the noise of this step;
  - `restart(state, key, init) -> state` changes what is trained, in a step that is due, and with it
    the optimizer's state;
  - `around(step) -> step` keeps from the step what it has no use for.

  What they do depends on `state['step']` alone, so that a resumed run does the same.

  Args:
    step: `step(state, batch) -> (state, metrics)`.
    spec: A specification; None for no adapter.
    key: Root key of its draws.
    init: `init` of the optimizer, which a `restart` needs; or one for each of the trees that the
      parameters are in.
    restart: In place of the specification's, where a step's state is not all at hand.
  """
  restart = restart or getattr(spec, 'restart', None)
  advance = getattr(spec, 'advance', None)
  if restart is None and advance is None:
    return step
  step = spec.around(step) if hasattr(spec, 'around') else step

  def acting(state, batch):
    if restart is not None:
      state = _restarted(restart, state, fold_in_path(key, 'restart'), init)
    if advance is not None:
      state = advance(state, key)
    return step(state, batch)

  return acting


def _restarted(restart, state, key, init):
  if not isinstance(init, Mapping):
    return restart(state, key, init)
  parts = {}
  for name in init:
    part = {k: state[k][name] for k in ('params', 'opt')} | {'step': state['step']}
    parts[name] = restart(part, fold_in_path(key, name), init[name])
  return {**state, **{k: {n: part[k] for n, part in parts.items()} for k in ('params', 'opt')}}
