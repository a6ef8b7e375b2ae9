"""What a method does between two updates: new noise, a merge, a switch."""

from collections.abc import Callable
from typing import Any

import jax

from memjax.naming import fold_in_path


def over_time(step: Callable, spec: Any, key: jax.Array, init: Callable | None = None) -> Callable:
  """Returns a training step that first lets the method act on the state.

  Any step will do. A specification may have either of two methods, or both:

  - `advance(state, key) -> state` gives the leaves the noise of this step;
  - `restart(state, key, init) -> state` changes what is trained, in a step that is due, and with it
    the optimizer's state.

  What they do depends on `state['step']` alone, so that a resumed run does the same.

  Args:
    step: `step(state, batch) -> (state, metrics)`.
    spec: A specification; None for no adapter.
    key: Root key of its draws.
    init: `init` of the optimizer, which a `restart` needs.
  """
  restart, advance = getattr(spec, 'restart', None), getattr(spec, 'advance', None)
  if restart is None and advance is None:
    return step

  def acting(state, batch):
    if restart is not None:
      state = restart(state, fold_in_path(key, 'restart'), init)
    if advance is not None:
      state = advance(state, key)
    return step(state, batch)

  return acting
