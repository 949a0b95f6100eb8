"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], seconds: float = 30, every: float = 0.005) -> T:
    """What the condition gives as soon as it is true; AssertionError where it is not in so many seconds. every: how
    often it is asked, in seconds: less often where a question is a process."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not true after {seconds} s: {found!r}"
        time.sleep(every)
    return found


def process_state(pid: int) -> str:
    """What proc(5) calls its state: R runs, S sleeps, T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
