"""Stopping in time: a termination signal becomes a question that the training loop asks."""

import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Turns SIGTERM into a flag while the training loop runs; a context manager.

  Before `defer` is called there is no progress to save, and the signal ends the process at once
  with exit status 0.

  With several processes the signal stays with JAX, which takes it from `jax.distributed.initialize`
  on: its coordination service hears of a signal to any process, and agrees on one question to which
  all of them get a yes. Nothing is communicated between devices. A signal during start-up is
  answered at the first question.
  """

  def __init__(self):
    self._deferred = False
    self._requested = False
    self._questions = 0
    self._previous = None

  def __enter__(self) -> 'Preemption':
    if jax.distributed.is_initialized():  # Asking for the process count would start the backend.
      return self
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

  def requested(self) -> bool:
    """Whether to save and stop now. Every process must ask equally often, and gets one answer."""
    if not self._requested and jax.process_count() > 1:
      self._questions += 1  # JAX agrees on a number: theirs must be consecutive, from 1.
      self._requested = multihost_utils.reached_preemption_sync_point(self._questions)
    return self._requested

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    del signum, frame
    self._requested = True  # Also remembered when a library swallows the exit.
    if not self._deferred:
      sys.exit(0)
