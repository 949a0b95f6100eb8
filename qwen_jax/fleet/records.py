"""What a worker leaves for those who watch it: `progress.json`. Nothing in a resume reads it."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Self

RUNNING, ENDED, FAILED, TERMINATED = "running", "ended", "failed", "terminated"
HISTORY_POINTS = 120
"""The most points of the throughput history that a record keeps."""


def progress_name(worker_id: int | None = None) -> str:
    """The file's name in a checkpoint folder, where workers lie side by side; without an id in a bucket."""
    return "progress.json" if worker_id is None else f"progress_worker_{worker_id}.json"


@dataclass
class ProgressRecord:
    """One worker's progress. Times are seconds since 1970, of the worker's clock; counts are of the whole run, but
    tokens and raw_bytes, which are of this start.

    exit_code: once it has ended. history: [time, samples_done, tokens] points of this start.
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

    def add_point(self, now: float) -> None:
        """Adds where it is now to the history; when that is full, every second point goes, now and from then on."""
        points = self.history
        if len(points) > 2 and now - points[-2][0] < 0.99 * (points[1][0] - points[0][0]):
            points.pop()
        points.append([round(now, 1), self.samples_done, self.tokens])
        if len(points) > HISTORY_POINTS:
            self.history = points[::2]

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads a record back; raises ValueError for anything that no worker writes."""
        values = json.loads(data)
        if not isinstance(values, dict) or set(values) != {each.name for each in fields(cls)}:
            raise ValueError("has other keys than a progress record")
        record = cls(**values)
        counts = (
            record.worker_id,
            record.samples_done,
            record.samples_total,
            record.shards,
            record.exit_code or 0,
        )
        times = (
            record.started_at,
            record.updated_at,
            record.last_shard_at or 0,
            record.tokens,
            record.raw_bytes,
        )
        points = record.history if isinstance(record.history, list) else [None]
        good = (
            all(type(count) is int and count >= 0 for count in counts)
            and all(_is_number(value) for value in times)
            and all(isinstance(text, str) for text in (record.status, record.message))
            and all(
                isinstance(point, list) and len(point) == 3 and all(map(_is_number, point))
                for point in points
            )
        )
        if not good:
            raise ValueError("holds values that no worker writes")
        return record


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
