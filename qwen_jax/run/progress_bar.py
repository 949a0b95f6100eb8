"""What a running worker says: a bar on a terminal, one plain line every 30 s elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

from qwen_jax.ledger.progress_record import ProgressRecord
from qwen_jax.ledger.schema import RUNNING

LINE_EVERY_S = 30.0


class Progress:
    """Counts samples and shards of the whole run, and shows them with the rates of this start and an ETA."""

    def __init__(self, done: int, total: int, shards: Callable[[], int], backlog: Callable[[], int]):
        """done, total: stream lines dealt with before this start, and in all.

        shards, backlog: how many are durable, and how many are about to be.
        """
        self._done, self._total = done, total
        self._first, self._shards = done, shards
        self._tokens = self._raw_bytes = 0
        self._backlog = backlog
        self._started = self._last_line = time.monotonic()
        self._started_at = time.time()
        self._last_shard_at: float | None = None
        self._bar = tqdm(total=total, initial=done, unit="sample") if sys.stderr.isatty() else None

    def sample(self, sample_idx: int, tokens: int, raw_bytes: int) -> None:
        """One more sample has left the device."""
        self._tokens += tokens
        self._raw_bytes += raw_bytes
        step, self._done = sample_idx + 1 - self._done, sample_idx + 1
        if self._bar is not None:
            self._bar.update(step)
            self._bar.set_postfix_str(self._rates(), refresh=False)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._print_line()

    def shard(self) -> None:
        """One more shard was handed over for writing."""
        self._last_shard_at = time.time()

    def finish(self) -> None:
        """The stream is at its end: what followed the last sample was skipped."""
        if self._bar is not None:
            self._bar.update(self._total - self._done)
        self._done = self._total

    def record(self, worker_id: int) -> ProgressRecord:
        """Where it is now, for those who watch."""
        return ProgressRecord(
            worker_id,
            RUNNING,
            self._done,
            self._total,
            self._shards(),
            self._tokens,
            self._raw_bytes,
            self._started_at,
            time.time(),
            self._last_shard_at,
        )

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return (
            f"{self._tokens / seconds:.0f} tokens/s, {self._raw_bytes / seconds / 1e6:.1f} MB/s, "
            f"{self._shards()} shards, backlog {self._backlog()}"
        )

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        per_sample = (self._last_line - self._started) / max(self._done - self._first, 1)
        eta = tqdm.format_interval(per_sample * (self._total - self._done))
        line = f"{self._done}/{self._total} samples, {self._rates()}, ETA {eta}"
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._first:
            self._print_line()
