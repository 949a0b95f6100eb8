"""SIGTERM: stop feeding, let what is under way finish if it can, and exit 143 within the grace time."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from qwen_jax.errors import TerminatedError

log = logging.getLogger(__name__)

T = TypeVar("T")

# Spot VMs and GKE spot pods give 15 to 30 s; the design promises 10.
GRACE_S = 8.0


def run_until_sigterm(work: Callable[[threading.Event], T]) -> T:
    """Runs `work(stop)` on a thread of its own and returns its result or raises its error.

    The main thread only waits: Python runs signal handlers there, and a long compilation would keep it
    from them. SIGTERM sets `stop`; work that has not ended GRACE_S later is cut off where it is, which
    the commit protocol allows at any point. Ends in TerminatedError (exit 143) either way.
    """
    stop, done = threading.Event(), threading.Event()
    outcome: list = []

    def run() -> None:
        try:
            outcome.append((work(stop), None))
        except BaseException as error:  # noqa: BLE001  (it is raised in the main thread)
            outcome.append((None, error))
        finally:
            done.set()

    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        threading.Thread(target=run, name="worker", daemon=True).start()
        while not done.is_set() and not stop.is_set():
            done.wait(0.2)
        if not done.wait(GRACE_S if stop.is_set() else None):
            log.warning(
                "SIGTERM: cut off after %.0f s; the next start resumes from the last checkpoint", GRACE_S
            )
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(TerminatedError.exit_code)
    finally:
        signal.signal(signal.SIGTERM, previous)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
