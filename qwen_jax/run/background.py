"""What a Committer does beside the device, and how many shards it has under way."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from qwen_jax.ledger.metadata import Ledger
from qwen_jax.run.commit import Committer
from qwen_jax.run.pipeline import FilledShard

log = logging.getLogger(__name__)

UPLOADS = 8
"""Shards that may be on their way to the bucket at once: one connection is far slower than a machine's network."""
SHARDS_ON_DISK = UPLOADS + 1
"""Most shards on the local disk where each is deleted once it is uploaded: those, and one being written."""


class Publisher:
    """Names, uploads and commits shards, up to UPLOADS of them at once: they are named one after the other, uploaded
    beside one another, and each is committed after the one before.

    A failure is raised by the next call. At the end of the `with` block what is under way is stored, if it can be;
    after an exception `stop` is set, which ends what is tried again.
    """

    def __init__(self, committer: Committer, stop: threading.Event | None = None):
        self._committer = committer
        self._stop = stop or threading.Event()
        self._namer = ThreadPoolExecutor(1, thread_name_prefix="name")
        self._publishers = ThreadPoolExecutor(UPLOADS, thread_name_prefix="publish")
        self._named: Future[Ledger] | None = None
        self._published: deque[Future[None]] = deque()

    def add(self, name: Callable[[], Ledger]) -> None:
        """Waits until the shard before is named and there is room, then starts on the last shard of what `name`
        returns."""
        _result(self._named)
        self.wait(most=UPLOADS - 1)
        before = self._published[-1] if self._published else None
        self._named = self._namer.submit(name)
        self._published.append(self._publishers.submit(self._publish, self._named, before))

    def wait(self, *, most: int = 0) -> None:
        """Returns when at most so many are not known to be durable; raises what went wrong with any of them."""
        while True:
            done = [published for published in self._published if published.done()]
            for published in done:
                published.result()
                self._published.remove(published)
            if len(self._published) <= most:
                return
            wait(self._published, return_when=FIRST_COMPLETED)

    @property
    def backlog(self) -> int:
        """Shards being named, uploaded or committed now."""
        return sum(not published.done() for published in tuple(self._published))

    def _publish(self, named: Future[Ledger], before: Future[None] | None) -> None:
        ledger = named.result()
        if before is not None and before.done():
            before.result()  # after a failure nothing behind it need be uploaded
        self._committer.upload(ledger)
        _result(before)
        self._committer.commit(ledger)

    def abandon(self, error: BaseException) -> None:
        """Ends what is tried again."""
        self._stop.set()
        if under_way := self.backlog:
            log.warning("%s; waiting for %d shards that are being stored", error, under_way)

    def __enter__(self) -> "Publisher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.abandon(error)
        self._namer.shutdown()
        self._publishers.shutdown()


class BackgroundCommitter:
    """A Publisher of shards that a thread of its own compresses.

    So at most two shards are held in memory, one being filled and one being compressed. Failures and the end of the
    `with` block: as of the Publisher.
    """

    def __init__(self, committer: Committer, stop: threading.Event | None = None):
        self._committer = committer
        self._publisher = Publisher(committer, stop)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="compress")
        self._written: Future[None] | None = None

    def add(self, shard: FilledShard) -> None:
        """Waits until the shard before is written, then starts on this one."""
        _result(self._written)
        self._publisher.wait(most=UPLOADS)  # after a failure nothing more need be compressed
        self._written = self._writer.submit(self._write, shard)

    def wait(self) -> None:
        """Returns when all that was added is durable; raises what went wrong."""
        _result(self._written)
        self._publisher.wait()

    @property
    def backlog(self) -> int:
        """Shards being compressed, named, uploaded or committed now."""
        compressing = self._written is not None and not self._written.done()
        return compressing + self._publisher.backlog

    def _write(self, shard: FilledShard) -> None:
        written = self._committer.write(shard)
        try:
            self._publisher.add(partial(self._committer.name, written))
        except BaseException:
            written.file.discard()
            raise

    def __enter__(self) -> "BackgroundCommitter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._publisher:
            if error is not None:
                self._publisher.abandon(error)
            self._writer.shutdown()


def _result(step: Future[Any] | None) -> None:
    if step is not None:
        step.result()
