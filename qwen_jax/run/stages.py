"""Where a worker's time goes: seconds that its main thread waits for each stage (--verbose)."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class Stages:
    """Adds up seconds by stage."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def waiting_for(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[stage] += time.monotonic() - started

    def each(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """The items, each waited for. What a stage waits for within them counts for both."""
        iterator = iter(items)
        while True:
            with self.waiting_for(stage):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def __str__(self) -> str:
        return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self._seconds.items())


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Logs, for --verbose, how long it took."""
    started = time.monotonic()
    yield
    log.debug("%s: %.2f s", what, time.monotonic() - started)
