"""The state of every worker, from checkpoints, progress records and metadata, wherever these lie."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from qwen_jax.ledger.checkpoint import SeenCheckpoint, seen_checkpoint
from qwen_jax.ledger.checks import DamagedError
from qwen_jax.ledger.metadata import seen_metadata
from qwen_jax.ledger.progress_record import ProgressRecord
from qwen_jax.ledger.schema import (
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    NOT_STARTED,
    RUNNING,
    STARTING,
    TERMINATED,
)
from qwen_jax.ledger.worker_files import File, StoreFiles, WorkerFiles

STALLED, UNREADABLE, SLOW = "stalled", "unreadable", "slow"
PROBLEMS = (FAILED, STALLED, UNREADABLE)
"""States that need somebody, worst first."""
ALIVE = (IN_PROGRESS, SLOW)
STALLED_AFTER_S = 900.0
_SLOW_FACTOR = 2.0
_SLOW_BY_S = 600.0
_ENOUGH_TO_COMPARE = 3
_BUDGET_S, _ANSWER_S = 20.0, 15.0
"""A person waits, and looks again: less than a worker's patience."""


def bucket_files(url: str) -> StoreFiles:
    """The workers' folders in a bucket. url: what lies above tpu_0, tpu_1, ...; raises what open_store does."""
    from qwen_jax.storage.opening import open_store

    return StoreFiles(open_store(url.rstrip("/"), budget_s=_BUDGET_S, timeout_s=_ANSWER_S))


def _read(file: File) -> bytes | None:
    try:
        return file.read()
    except OSError:  # there, but it cannot be read
        return b""


@dataclass(frozen=True)
class WorkerState:
    """One worker as it looks now. state: one of the names above; shown: the status that the checkpoint says.

    durable, shards: stream lines dealt with and shards, by the checkpoint. samples: lines dealt with, those on their
    way too. total: lines of the stream; None where nobody says. bytes: compressed, in the shards. since_shard_s:
    seconds since the last shard was handed over. message: of a problem, or what else there is to know.
    layer_norms: mean norm by layer. model: its name, as metadata.json has it.
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
    model: str = ""

    @property
    def share(self) -> float | None:
        """Of the stream, 0 to 1."""
        if self.state == COMPLETED:
            return 1.0
        return min(self.samples / self.total, 1.0) if self.total else None

    @property
    def facts(self) -> dict[str, str]:
        """What is known, in words, for a table or a page."""
        total = "?" if self.total is None else self.total
        known = {
            "samples": f"{self.samples}/{total}",
            "%": None if self.share is None else f"{100 * self.share:.1f}",
            "shards": str(self.shards),
            "GB": None if self.bytes is None else f"{self.bytes / 1e9:.2f}",
            "tokens/s": None if self.tokens_per_second is None else f"{self.tokens_per_second:.0f}",
            "ETA": None if self.eta_s is None else duration(self.eta_s),
            "last shard": None if self.since_shard_s is None else f"{duration(self.since_shard_s)} ago",
        }
        return {name: words for name, words in known.items() if words is not None}

    def guide_line(self) -> str:
        """As docs/guide.md shows it."""
        if self.state == UNREADABLE:
            return f"Worker {self.worker}: checkpoint unreadable ({self.message})"
        if not self.shown:
            return f"Worker {self.worker}: Not started"
        return f"Worker {self.worker}: {self.durable} samples, {self.shards} shards, {self.shown}"


def look(files: WorkerFiles, now: float, stalled_after_s: float = STALLED_AFTER_S) -> WorkerState:
    """The worker's state at `now` (seconds since 1970). A worker is stalled when its record is older than
    `stalled_after_s`, or shows no sample in that time."""
    worker, data = files.worker, _read(files.checkpoint)
    record = _progress(_read(files.progress), worker)
    size, norms, model = _metadata(_read(files.metadata))
    found = SeenCheckpoint(0, 0, "")
    if data is not None:
        try:
            found = seen_checkpoint(data, worker)
        except DamagedError:
            return WorkerState(worker, UNREADABLE, message=str(files.checkpoint))
    seen = WorkerState(
        worker,
        state=found.status or NOT_STARTED,
        shown=found.status,
        durable=found.samples,
        samples=found.samples,
        shards=found.shards,
        bytes=size,
        layer_norms=norms,
        model=model,
    )
    return seen if record is None else _with_record(seen, record, now, stalled_after_s)


def _with_record(
    seen: WorkerState, record: ProgressRecord, now: float, stalled_after_s: float
) -> WorkerState:
    state, message = _judge(record, seen.shown, now, stalled_after_s)
    lively = state == IN_PROGRESS and record.status == RUNNING
    return replace(
        seen,
        state=state,
        shown=seen.shown or (IN_PROGRESS if _has_begun(record) else ""),
        samples=seen.samples if state == COMPLETED else max(seen.samples, record.samples_done),
        total=record.samples_total or None,
        tokens_per_second=record.tokens_per_second if lively else None,
        eta_s=record.eta_s if lively else None,
        since_shard_s=None if record.last_shard_at is None else max(0.0, now - record.last_shard_at),
        message=message,
        history=record.whole_history,
    )


def _has_begun(record: ProgressRecord) -> bool:
    """A worker that is refused at its start, or fails before it has its stream, has not."""
    return record.status != FAILED or record.samples_total > 0


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
    return IN_PROGRESS, "starting: model, stream and what is stored" if record.status == STARTING else ""


def mark_slow(states: Sequence[WorkerState]) -> list[WorkerState]:
    """Those that get on, but will keep all others waiting, as SLOW: their time left is far above the median's."""
    left = [state.eta_s for state in states if state.state == IN_PROGRESS and state.eta_s is not None]
    if len(left) < _ENOUGH_TO_COMPARE:
        return list(states)
    usual = statistics.median(left)
    return [
        replace(
            state,
            state=SLOW,
            message=f"{duration(state.eta_s)} left, the median worker has {duration(usual)}",
        )
        if state.state == IN_PROGRESS and state.eta_s is not None and _is_far_above(state.eta_s, usual)
        else state
        for state in states
    ]


def _is_far_above(left: float, usual: float) -> bool:
    return left > _SLOW_FACTOR * usual and left > usual + _SLOW_BY_S


def _progress(data: bytes | None, worker: int) -> ProgressRecord | None:
    """None for what is not whole, and for another worker's."""
    try:
        record = None if data is None else ProgressRecord.parse(data)
    except DamagedError:
        return None
    return record if record is not None and record.worker_id == worker else None


def _metadata(data: bytes | None) -> tuple[int | None, dict[str, float], str]:
    """Compressed bytes, mean norms and the model; nothing where the file is not one of ours, whole."""
    try:
        return (None, {}, "") if data is None else seen_metadata(data)
    except DamagedError:
        return None, {}, ""


def totals_line(states: Sequence[WorkerState]) -> str:
    """As docs/guide.md shows it."""
    completed = sum(state.state == COMPLETED for state in states)
    started = sum(bool(state.shown) for state in states)
    return (
        f"Total: {sum(state.durable for state in states)} samples, {sum(state.shards for state in states)} shards; "
        f"{completed} of {len(states)} workers completed, {started} started"
    )


def problems_first(states: Sequence[WorkerState]) -> list[WorkerState]:
    """Failed, stalled and unreadable workers, then slow ones, then the others, each by id."""
    order = {state: rank for rank, state in enumerate((*PROBLEMS, SLOW))}
    return sorted(states, key=lambda state: (order.get(state.state, len(order)), state.worker))


_COLUMNS = {"samples": 15, "%": 6, "shards": 6, "GB": 8, "tokens/s": 9, "ETA": 8, "last shard": 0}


def details(states: Sequence[WorkerState]) -> Iterator[str]:
    """A table of what is known beyond the guide's lines; nothing where no worker has left a record."""
    known = [state for state in problems_first(states) if state.total is not None or state.state in PROBLEMS]
    if all(state.total is None and state.state != FAILED for state in known):
        return
    yield ""
    yield _row("worker", "state", {name: name for name in _COLUMNS})
    for state in known:
        yield _row(str(state.worker), state.state, state.facts)
        if state.message:
            yield f"{'':>6} {state.message}"


def _row(worker: str, state: str, facts: dict[str, str]) -> str:
    cells = " ".join(f"{facts.get(name, ''):>{width}}" for name, width in _COLUMNS.items())
    return f"{worker:>6} {state:<12} {cells}".rstrip()


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.1 d`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} d"


def exit_code(states: Sequence[WorkerState]) -> int:
    """0: all workers are complete; 2: one is failed, stalled or unreadable; 1: otherwise."""
    if any(state.state in PROBLEMS for state in states):
        return 2
    return 0 if all(state.state == COMPLETED for state in states) else 1
