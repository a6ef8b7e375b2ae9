"""Stopping in time: a termination signal becomes a question that the training loop asks."""

import contextlib
import os
import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
  """Turns SIGTERM and Ctrl-C into a flag while the training loop runs; a context manager.

  Before `defer` is called there is no progress to save: SIGTERM ends the process at once with exit
  status 0, and Ctrl-C does what it did before. From then on the first Ctrl-C waits like SIGTERM and
  is raised as `KeyboardInterrupt` at the end of the block, when all is saved, so that whoever
  called does not go on as if the run were finished. A second one interrupts at once.

  With several processes SIGTERM stays with JAX, which takes it from `jax.distributed.initialize`
  on: its coordination service hears of a signal to any process, and agrees on one question to which
  all of them get a yes. Nothing is communicated between devices. A signal during start-up is
  answered at the first question. Ctrl-C is passed on as SIGTERM.
  """

  def __init__(self):
    self._deferred = False
    self._requested = False
    self._interrupted = False
    self._questions = 0
    self._previous = {}  # Handlers to put back, by signal.

  def __enter__(self) -> 'Preemption':
    # Asking for the process count would start the backend.
    if not jax.distributed.is_initialized():
      self._take(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, kind, *exc_info):
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
    if self._interrupted and kind is None:
      raise KeyboardInterrupt

  def defer(self) -> None:
    """From here on signals wait until the loop asks."""
    self._deferred = True
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # As in the background of a script.
      self._take(signal.SIGINT, self._interrupt)

  def requested(self) -> bool:
    """Whether to save and stop now. Every process must ask equally often, and gets one answer."""
    if not self._requested and jax.process_count() > 1:
      self._questions += 1  # JAX agrees on a number: theirs must be consecutive, from 1.
      self._requested = multihost_utils.reached_preemption_sync_point(self._questions)
    return self._requested

  def _take(self, signum, handler):
    # Not in the main thread, as under some notebooks, there is nothing to take over.
    with contextlib.suppress(ValueError):
      self._previous[signum] = signal.signal(signum, handler)

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    del signum, frame
    self._requested = True  # Also remembered when a library swallows the exit.
    if not self._deferred:
      sys.exit(0)

  def _interrupt(self, signum: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(signum, self._previous[signum])
    self._interrupted = True
    os.write(2, b'\nsaving after this step; Ctrl-C again stops at once\n')
    if jax.distributed.is_initialized():
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._requested = True
