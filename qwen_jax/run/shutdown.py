"""SIGTERM and Ctrl-C: stop feeding, let what is under way finish if it can, and exit within the grace time."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from qwen_jax.errors import CancelledError, TerminatedError

log = logging.getLogger(__name__)

T = TypeVar("T")

# Spot VMs and GKE spot pods give 15 to 30 s; the design promises 10.
GRACE_S = 8.0
_ERRORS = {signal.SIGTERM: TerminatedError, signal.SIGINT: CancelledError}
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def run_until_stopped(work: Callable[[threading.Event], T]) -> T:
    """Runs `work(stop)` on a thread of its own and returns its result or raises its error.

    The main thread only waits: Python runs signal handlers there, and a long compilation would keep it
    from them. SIGTERM or Ctrl-C sets `stop`; work that has not ended GRACE_S later, or at a second Ctrl-C, is cut
    off where it is, which the commit protocol allows at any point. Ends in TerminatedError (exit 143) or
    CancelledError (130) either way.
    """
    stop, done = threading.Event(), threading.Event()
    outcome: list = []
    received: list[signal.Signals] = []

    def run() -> None:
        try:
            outcome.append((work(stop), None))
        except BaseException as error:  # noqa: BLE001  (it is raised in the main thread)
            outcome.append((None, error))
        finally:
            done.set()

    def receive(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            _cut_off(received[0], "at once")
        received.append(signal.Signals(number))
        # A second one may come in the middle of setting it, and the event's lock is not reentrant.
        if len(received) == 1:
            stop.set()

    previous = {number: signal.signal(number, receive) for number in _ERRORS}
    try:
        threading.Thread(target=run, name="worker", daemon=True).start()
        while not done.is_set() and not received:
            done.wait(0.2)
        if not done.wait(GRACE_S if received else None):
            _cut_off(received[0], f"after {GRACE_S:.0f} s")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    result, error = outcome[0]
    if isinstance(error, TerminatedError) and received:
        raise _ERRORS[received[0]](f"{_NAMES[received[0]]}: {error}") from error
    if error is not None:
        raise error
    return result


def raise_if(stop: threading.Event) -> None:
    """Raises TerminatedError once `stop` is set."""
    if stop.is_set():
        raise TerminatedError("stopped; the next start resumes from the last checkpoint")


def _cut_off(received: signal.Signals, when: str) -> None:
    name = _NAMES[received]
    log.warning("%s: cut off %s; the next start resumes from the last checkpoint", name, when)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_ERRORS[received].exit_code)
