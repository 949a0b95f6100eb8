"""What a worker leaves for those who watch it: `progress.json`. Nothing in a resume reads it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Self

from qwen_jax.errors import shown
from qwen_jax.ledger.checks import DamagedError, parse
from qwen_jax.ledger.schema import PROGRESS

HISTORY_POINTS = 120
"""The most points of the throughput history that a record keeps: of this start, and of earlier ones."""
_LONGEST_MESSAGE = 500


def one_line(text: str) -> str:
    """Somebody else's words, fit for a terminal: one line, without control characters, not endless."""
    line = " ".join(shown(" ".join(text.split())).split())
    return line if len(line) <= _LONGEST_MESSAGE else f"{line[:_LONGEST_MESSAGE]} ..."


@dataclass
class ProgressRecord:
    """One worker's progress. Times are seconds since 1970, of the worker's clock; counts are of the whole run, but
    tokens and raw_bytes, which are of this start.

    exit_code: once it has ended. history: [time, samples_done, tokens] points of this start. earlier: those of the
    starts before it, whose tokens go on from start to start.
    """

    worker_id: int
    status: str
    samples_done: int
    samples_total: int
    shards: int
    tokens: int
    raw_bytes: int
    started_at: float
    updated_at: float
    last_shard_at: float | None = None
    message: str = ""
    exit_code: int | None = None
    history: list[list[float]] = field(default_factory=list)
    earlier: list[list[float]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last tenth of the history, at least its last two points."""
        points = self.history[-max(2, len(self.history) // 10) :]
        if len(points) < 2 or points[-1][0] <= points[0][0]:
            return None
        return (points[-1][2] - points[0][2]) / (points[-1][0] - points[0][0])

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the pace since this start."""
        if len(self.history) < 2:
            return None
        first, last = self.history[0], self.history[-1]
        done, seconds = last[1] - first[1], last[0] - first[0]
        return (self.samples_total - self.samples_done) * seconds / done if done > 0 else None

    @property
    def whole_history(self) -> list[list[float]]:
        """Of all starts; tokens go on from start to start."""
        before = self.earlier[-1][2] if self.earlier else 0
        return [*self.earlier, *([when, samples, before + tokens] for when, samples, tokens in self.history)]

    def add_point(self, now: float) -> None:
        """Adds where it is now to the history; when that is full, every second point goes, now and from then on."""
        points = self.history
        if len(points) > 2 and now - points[-2][0] < 0.99 * (points[1][0] - points[0][0]):
            points.pop()
        points.append([round(now, 1), self.samples_done, self.tokens])
        if len(points) > HISTORY_POINTS:
            self.history = points[::2]

    def go_on_from(self, before: Self | None) -> None:
        """Takes over what an earlier start left: its history, and its counts while this one has none."""
        if before is None:
            return
        points = before.whole_history
        while len(points) > HISTORY_POINTS:
            points = [*points[:-1:2], points[-1]]
        self.earlier = points
        if not self.samples_total:
            self.samples_done, self.samples_total = before.samples_done, before.samples_total
            self.shards, self.last_shard_at = before.shards, before.last_shard_at

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads a record back; raises DamagedError for anything that no worker writes."""
        record = cls(**parse(data, PROGRESS))
        if record.samples_done > record.samples_total:
            raise DamagedError("it has more samples done than there are")
        record.message = one_line(record.message)
        return record
