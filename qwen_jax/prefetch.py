"""One thread ahead: the next items are made while the last ones are used."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yields `items` from a thread that runs at most `depth` items ahead; its errors are raised here."""
    ahead: queue.Queue = queue.Queue(depth)
    abandoned = threading.Event()
    end = object()

    def offer(item: object) -> bool:
        while not abandoned.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer((item, None)):
                    return
            offer((end, None))
        except BaseException as error:  # noqa: BLE001  (it is raised in the consumer's thread)
            offer((end, error))

    thread = threading.Thread(target=produce, name="read", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ahead.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        abandoned.set()
        thread.join()
