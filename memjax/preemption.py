"""Stopping in time: a termination signal becomes a question that the training loop asks."""

import signal
import sys
from types import FrameType

import jax


class Preemption:
  """Turns SIGTERM into a flag while the training loop runs.

  Before `defer` is called there is no progress to save, and the signal ends the process at once
  with exit status 0. With several processes, all answer `requested` alike: JAX's coordination
  service agrees on one step for everybody.
  """

  def __init__(self):
    self._received = False
    self._deferred = False
    self._previous = None

  def __enter__(self) -> 'Preemption':
    try:
      self._previous = signal.signal(signal.SIGTERM, self._handle)
    except ValueError:  # Not in the main thread, as under some notebooks: nothing to take over.
      self._previous = None
    return self

  def __exit__(self, *exc_info):
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def defer(self) -> None:
    """From here on the signal waits until the loop asks."""
    self._deferred = True

  def requested(self, step: int) -> bool:
    """Whether to save and stop now, after `step` finished updates."""
    if jax.process_count() == 1:
      return self._received
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  @property
  def received(self) -> bool:
    """Whether this process has had the signal; other processes may not know yet."""
    return self._received

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    del signum, frame
    self._received = True
    if not self._deferred:
      sys.exit(0)
