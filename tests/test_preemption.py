"""Signals while a run is under way: the loop hears of them and stops in its own time."""

import os
import signal

import pytest

from memjax.preemption import Preemption


@pytest.fixture(autouse=True)
def in_a_terminal():
  """Where Ctrl-C is not ignored, as it is in the background of a script."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def send(signum):
  os.kill(os.getpid(), signum)


def test_sigterm_is_a_request_once_there_is_progress():
  before = signal.getsignal(signal.SIGTERM)
  with Preemption() as preemption:
    preemption.defer()
    assert not preemption.requested()
    send(signal.SIGTERM)
    assert preemption.requested()
  assert signal.getsignal(signal.SIGTERM) == before


def test_the_first_ctrl_c_is_a_request_and_raised_when_all_is_saved():
  saved = []
  with pytest.raises(KeyboardInterrupt), Preemption() as preemption:  # noqa: PT012
    preemption.defer()
    send(signal.SIGINT)
    assert preemption.requested()
    saved.append(True)
  assert saved
  assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_the_second_ctrl_c_interrupts_at_once():
  reached = []
  with pytest.raises(KeyboardInterrupt), Preemption() as preemption:  # noqa: PT012
    preemption.defer()
    send(signal.SIGINT)
    send(signal.SIGINT)
    reached.append(True)
  assert not reached


def test_ctrl_c_that_was_ignored_stays_ignored():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with Preemption() as preemption:
    preemption.defer()
    send(signal.SIGINT)
    assert not preemption.requested()
