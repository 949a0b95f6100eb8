"""The state of every worker, from checkpoints, progress records and metadata, wherever these lie."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qwen_jax.fleet.records import FAILED, RUNNING, TERMINATED, ProgressRecord, progress_name

NOT_STARTED, IN_PROGRESS, COMPLETED = "not_started", "in_progress", "completed"
STALLED, UNREADABLE = "stalled", "unreadable"
PROBLEMS = (FAILED, STALLED, UNREADABLE)
"""States that need somebody, worst first."""
STALLED_AFTER_S = 900.0


class Source(Protocol):
    """Where workers' files lie."""

    def checkpoint(self, worker: int) -> bytes | None: ...
    def progress(self, worker: int) -> bytes | None: ...
    def metadata(self, worker: int) -> bytes | None: ...
    def checkpoint_place(self, worker: int) -> str: ...


class LocalSource:
    """The folders of this machine. output_dir: for sizes and norms, where metadata.json is there."""

    def __init__(self, checkpoint_dir: Path, output_dir: Path):
        self._checkpoints = checkpoint_dir
        self._output = output_dir

    def checkpoint(self, worker: int) -> bytes | None:
        return _read(Path(self.checkpoint_place(worker)))

    def progress(self, worker: int) -> bytes | None:
        return _read(self._checkpoints / progress_name(worker))

    def metadata(self, worker: int) -> bytes | None:
        return _read(self._output / f"worker_{worker}" / "metadata.json")

    def checkpoint_place(self, worker: int) -> str:
        return str(self._checkpoints / f"checkpoint_worker_{worker}.json")


class BucketSource:
    """The workers' folders in a bucket. url: what lies above tpu_0, tpu_1, ...; raises what open_store does."""

    def __init__(self, url: str):
        from qwen_jax.storage.opening import open_store

        self._url = url.rstrip("/")
        self._store = open_store(self._url)

    def _get(self, name: str) -> bytes | None:
        stored = self._store.get_bytes(name)
        return stored[0] if stored else None

    def checkpoint(self, worker: int) -> bytes | None:
        return self._get(f"tpu_{worker}/checkpoint_worker_{worker}.json")

    def progress(self, worker: int) -> bytes | None:
        return self._get(f"tpu_{worker}/{progress_name()}")

    def metadata(self, worker: int) -> bytes | None:
        return self._get(f"tpu_{worker}/metadata.json")

    def checkpoint_place(self, worker: int) -> str:
        return f"{self._url}/tpu_{worker}/checkpoint_worker_{worker}.json"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # there, but of no use
        return b""


@dataclass(frozen=True)
class WorkerState:
    """One worker as it looks now. state: one of the names above; shown: the status that the checkpoint says.

    durable, shards: stream lines dealt with and shards, by the checkpoint. samples: lines dealt with, those on their
    way too. total: lines of the stream; None where nobody says. bytes: compressed, in the shards. since_shard_s:
    seconds since the last shard was handed over. message: of a problem. layer_norms: mean norm by layer.
    """

    worker: int
    state: str
    shown: str = ""
    durable: int = 0
    samples: int = 0
    shards: int = 0
    total: int | None = None
    bytes: int | None = None
    tokens_per_second: float | None = None
    eta_s: float | None = None
    since_shard_s: float | None = None
    message: str = ""
    history: list[list[float]] = field(default_factory=list)
    layer_norms: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Of the stream, 0 to 1."""
        if self.state == COMPLETED:
            return 1.0
        return self.samples / self.total if self.total else None

    def guide_line(self) -> str:
        """As docs/guide.md shows it."""
        if self.state == UNREADABLE:
            return f"Worker {self.worker}: checkpoint unreadable ({self.message})"
        if not self.shown:
            return f"Worker {self.worker}: Not started"
        return f"Worker {self.worker}: {self.durable} samples, {self.shards} shards, {self.shown}"


def look(source: Source, worker: int, now: float, stalled_after_s: float = STALLED_AFTER_S) -> WorkerState:
    """The worker's state at `now` (seconds since 1970). A worker is stalled when its record is older than
    `stalled_after_s`, or shows no sample in that time."""
    data = source.checkpoint(worker)
    record = _progress(source.progress(worker))
    size, norms = _metadata(source.metadata(worker))
    samples, shards, shown = 0, 0, ""
    if data is not None:
        try:
            samples, shards, shown = _checkpoint(data)
        except (ValueError, RecursionError):
            return WorkerState(worker, UNREADABLE, message=source.checkpoint_place(worker))
    if record is None:
        state = shown if shown == COMPLETED else IN_PROGRESS if shown else NOT_STARTED
        return WorkerState(worker, state, shown, samples, samples, shards, bytes=size, layer_norms=norms)
    state, message = _judge(record, shown, now, stalled_after_s)
    lively = state == IN_PROGRESS and record.status == RUNNING
    return WorkerState(
        worker,
        state,
        shown or IN_PROGRESS,
        samples,
        max(samples, record.samples_done) if state != COMPLETED else samples,
        shards,
        record.samples_total or None,
        size,
        record.tokens_per_second if lively else None,
        record.eta_s if lively else None,
        None if record.last_shard_at is None else max(0.0, now - record.last_shard_at),
        message,
        record.history,
        norms,
    )


def _judge(record: ProgressRecord, shown: str, now: float, stalled_after_s: float) -> tuple[str, str]:
    """State and message of a worker that has left a record."""
    if shown == COMPLETED:
        return COMPLETED, ""
    if record.status == FAILED:
        return FAILED, record.message
    silent = now - record.updated_at
    if silent > stalled_after_s:
        ended = "after SIGTERM" if record.status == TERMINATED else ""
        return STALLED, f"no sign of life for {duration(silent)} {ended}".strip()
    earlier = [point for point in record.history if record.updated_at - point[0] >= stalled_after_s]
    if record.status == RUNNING and earlier and earlier[-1][1] == record.samples_done:
        since = next(point[0] for point in record.history if point[1] == record.samples_done)
        return STALLED, f"no sample for {duration(record.updated_at - since)}"
    return IN_PROGRESS, ""


def _checkpoint(data: bytes) -> tuple[int, int, str]:
    """Samples, shards and status; raises ValueError for what no worker writes."""
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("no object")
    samples, shards = fields.get("total_samples_processed"), fields.get("total_shards")
    status = fields.get("status", IN_PROGRESS)
    if not all(type(count) is int and 0 <= count < 10**15 for count in (samples, shards)):
        raise ValueError("no counts")
    if not (
        isinstance(status, str)
        and status.isascii()
        and status.replace("_", "a").isalpha()
        and status.islower()
    ):
        raise ValueError("no status")
    return samples, shards, status


def _progress(data: bytes | None) -> ProgressRecord | None:
    try:
        return None if data is None else ProgressRecord.parse(data)
    except (ValueError, TypeError, RecursionError):
        return None


def _metadata(data: bytes | None) -> tuple[int | None, dict[str, float]]:
    """Compressed bytes and mean norms; nothing where the file is not whole."""
    try:
        fields: Any = json.loads(data) if data is not None else {}
        norms = {str(layer): float(norm["mean"]) for layer, norm in fields["layer_norms"].items()}
        return int(fields["totals"]["bytes"]), norms
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None, {}


def totals_line(states: list[WorkerState]) -> str:
    """As docs/guide.md shows it."""
    completed = sum(state.state == COMPLETED for state in states)
    started = sum(bool(state.shown) for state in states)
    return (
        f"Total: {sum(state.durable for state in states)} samples, {sum(state.shards for state in states)} shards; "
        f"{completed} of {len(states)} workers completed, {started} started"
    )


def problems_first(states: list[WorkerState]) -> list[WorkerState]:
    """Failed, stalled and unreadable workers, then the others, each by id."""
    order = {state: place for place, state in enumerate(PROBLEMS)}
    return sorted(states, key=lambda state: (order.get(state.state, len(order)), state.worker))


_ROW = "{:>6} {:<12} {:>15} {:>6} {:>6} {:>8} {:>9} {:>8} {}"


def details(states: list[WorkerState]) -> Iterator[str]:
    """A table of what is known beyond the guide's lines; nothing where no worker has left a record."""
    known = [state for state in problems_first(states) if state.total is not None or state.state in PROBLEMS]
    if all(state.total is None and state.state != FAILED for state in known):
        return
    yield ""
    yield _ROW.format("worker", "state", "samples", "%", "shards", "GB", "tokens/s", "ETA", "last shard")
    for state in known:
        share = "" if state.share is None else f"{100 * state.share:.1f}"
        size = "" if state.bytes is None else f"{state.bytes / 1e9:.2f}"
        speed = "" if state.tokens_per_second is None else f"{state.tokens_per_second:.0f}"
        eta = "" if state.eta_s is None else duration(state.eta_s)
        ago = "" if state.since_shard_s is None else f"{duration(state.since_shard_s)} ago"
        count = f"{state.samples}/{'?' if state.total is None else state.total}"
        yield _ROW.format(
            state.worker, state.state, count, share, state.shards, size, speed, eta, ago
        ).rstrip()
        if state.message:
            yield f"{'':>6} {state.message}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.1 d`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} d"


def exit_code(states: list[WorkerState]) -> int:
    """0: all workers are complete; 2: one is failed, stalled or unreadable; 1: otherwise."""
    if any(state.state in PROBLEMS for state in states):
        return 2
    return 0 if all(state.state == COMPLETED for state in states) else 1
