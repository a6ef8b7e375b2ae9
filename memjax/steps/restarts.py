"""Restarts of adapters whose weights are in the host's memory."""

from collections.abc import Callable
from typing import Any


def make_restart(spec: Any, flush: Callable) -> Callable | None:
  """Returns `restart(state, key, init) -> state` of a streamed training state, for
  `memjax.adapters.over_time`; None for a specification that has no restarts.

  What it changes is what the update before left, so that is applied first: where a restart is due,
  each matrix passes through the device once for the one and once for the other.

  Args:
    spec: Has `restart`, and `due(step)`, whether it may change anything before the next update.
    flush: Of `memjax.steps.streamed.make_flush`.
  """
  if not hasattr(spec, 'restart'):
    return None

  def restart(state, key, init):
    state = flush(state, spec.due(state['step']) & state['opt'].due)
    after = spec.restart({**state, 'opt': state['opt'].inner}, key, init)
    return {**after, 'opt': state['opt']._replace(inner=after['opt'])}

  return restart
