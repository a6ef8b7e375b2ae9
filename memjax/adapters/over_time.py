"""What a method does between two updates: new noise, a merge, a switch."""

from collections.abc import Callable
from typing import Any

import jax


def over_time(step: Callable, spec: Any, key: jax.Array) -> Callable:
  """Returns a training step that first lets the method act on the state.

  Any step will do. What a specification's `advance(state, key) -> state` does depends on
  `state['step']` alone, so that a resumed run does the same.

  Args:
    step: `step(state, batch) -> (state, metrics)`.
    spec: A specification, with or without `advance`; None for no adapter.
    key: Root key of its draws.
  """
  advance = getattr(spec, 'advance', None)
  return step if advance is None else lambda state, batch: step(advance(state, key), batch)
