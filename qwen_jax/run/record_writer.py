"""Writes the worker's progress record: once a minute, from a thread of its own, at best effort."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen_jax.errors import RETRY_BUDGET_S, TerminatedError, ToolkitError, WriterConflictError
from qwen_jax.ledger.checks import DamagedError
from qwen_jax.ledger.names import progress_name
from qwen_jax.ledger.progress_record import ProgressRecord, one_line
from qwen_jax.ledger.schema import ENDED, FAILED, RUNNING, STARTING, TERMINATED
from qwen_jax.run.exclusive import exclusive_folders
from qwen_jax.settings import Settings
from qwen_jax.storage.atomic import atomic_write
from qwen_jax.storage.opening import open_store
from qwen_jax.storage.store import Store

log = logging.getLogger(__name__)

_LAST_WRITE_S = 2.0
_REFUSAL_S = 20.0
"""Whoever has mistyped a flag does not wait for a bucket as a worker does."""


@dataclass(frozen=True)
class RecordPlaces:
    """Where a worker's record goes: beside its checkpoint (None: no local one) and to the bucket. output_dir: its
    lock says, as that of checkpoint_dir does, whether the worker runs."""

    worker_id: int
    output_dir: Path
    checkpoint_dir: Path | None
    bucket_url: str | None

    @classmethod
    def of(cls, settings: Settings) -> Self:
        folder = None if settings.no_checkpointing else settings.checkpoint_dir
        return cls(settings.worker_id, settings.worker_dir, folder, settings.bucket_url)


def record_writer(settings: Settings) -> "ProgressWriter":
    """For the worker of these settings; nothing is done yet."""
    places = RecordPlaces.of(settings)
    return _writer(places, settings.progress_interval_s, _LAST_WRITE_S, settings.gcs_retry_budget_s)


def _writer(
    places: RecordPlaces, interval_s: float, last_write_s: float, budget_s: float
) -> "ProgressWriter":
    def nothing_yet() -> ProgressRecord:
        now = time.time()
        return ProgressRecord(places.worker_id, STARTING, 0, 0, 0, 0, 0, started_at=now, updated_at=now)

    return ProgressWriter(
        places.worker_id,
        nothing_yet,
        places.checkpoint_dir,
        places.bucket_url,
        interval_s,
        last_write_s,
        budget_s,
    )


def record_refusal(places: RecordPlaces, error: ToolkitError) -> None:
    """Writes the record of a worker that is not started, because of `error`; none where that worker runs."""
    folders = [places.output_dir, *([places.checkpoint_dir] if places.checkpoint_dir else [])]
    with (
        suppress(ToolkitError),
        _writer(places, 1.0, _REFUSAL_S, _REFUSAL_S),
        exclusive_folders(folders, places.worker_id),
    ):
        raise error


class ProgressWriter:
    """Writes records from `begin` to the end of the `with` block, and a last one that says how it ended.

    A block that fails before `begin` leaves a record too. After a WriterConflictError there is none: it is then the
    other writer's. Whatever goes wrong with records is logged once and otherwise ignored; the end waits for the last
    one no longer than `last_write_s`.
    """

    def __init__(
        self,
        worker_id: int,
        snapshot: Callable[[], ProgressRecord],
        folder: Path | None,
        bucket_url: str | None,
        interval_s: float,
        last_write_s: float = _LAST_WRITE_S,
        budget_s: float = RETRY_BUDGET_S,
    ):
        """snapshot: the record until `follow` gives another. folder: of the checkpoint, None for no local record."""
        self._worker_id = worker_id
        self._source = (STARTING, snapshot)
        self._folder = folder
        self._bucket_url = bucket_url
        self._interval_s = interval_s
        self._last_write_s = last_write_s
        self._budget_s = budget_s
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._give_up = threading.Event()
        self._ended_as: tuple[str, str, int | None] | None = (ENDED, "", 0)
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def begin(self) -> None:
        """From now on there is a record: of a worker that starts."""
        if self._interval_s and not self._has_begun:
            self._thread.start()

    def follow(self, snapshot: Callable[[], ProgressRecord]) -> None:
        """From now on the record is this one, at once and at every interval."""
        self._source = (RUNNING, snapshot)
        if self._has_begun:
            self._wake.set()
        self.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._ended_as = _ending(error)
        self._stop.set()
        self._wake.set()
        if error is not None and self._ended_as is not None:
            self.begin()
        if self._has_begun:
            self._thread.join(self._last_write_s)
        self._give_up.set()

    @property
    def _has_begun(self) -> bool:
        return self._thread.ident is not None

    def _run(self) -> None:
        history: list[list[float]] = []
        before = self._at_best_effort(self._record_before)
        ended = False
        while not ended:
            ended = self._stop.is_set()
            status, snapshot = self._source
            outcome = self._ended_as if ended else (status, "", None)
            if outcome is None:
                return
            record = snapshot()
            record.status, record.message, record.exit_code = outcome
            record.history = history
            if status == RUNNING:
                record.add_point(time.time())
                history = record.history
            record.go_on_from(before)
            # A finished worker that is started again changes nothing.
            if not (before is not None and before.status == ENDED and status == STARTING and not outcome[2]):
                self._write(record)
            if not ended:
                self._wake.wait(self._interval_s)
                self._wake.clear()

    def _record_before(self) -> ProgressRecord | None:
        """What an earlier start left here, or else in the bucket."""
        path = self._folder and self._folder / progress_name(self._worker_id)
        data = None
        if path is not None and path.is_file():
            data = path.read_bytes()
        elif self._store is not None and (stored := self._store.get_bytes(progress_name())):
            data = stored[0]
        with suppress(DamagedError):
            if data is not None and (record := ProgressRecord.parse(data)).worker_id == self._worker_id:
                return record
        return None

    @cached_property
    def _store(self) -> Store | None:
        """Of the records alone, so that its waits and retries are nobody else's."""
        if self._bucket_url is None:
            return None
        # The worker's own store says what the bucket refuses; this one would say it once more.
        return open_store(
            self._bucket_url, stop=self._give_up, budget_s=self._budget_s, log_retries_at=logging.DEBUG
        )

    def _write(self, record: ProgressRecord) -> None:
        data = record.to_bytes()
        self._at_best_effort(lambda: self._write_locally(data))
        self._at_best_effort(lambda: self._store and self._store.put_bytes(progress_name(), data))

    def _at_best_effort(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # noqa: BLE001  (a record must never fail a run)
            if not self._complained and not self._give_up.is_set():
                log.warning("the progress record cannot be kept (%s); nothing else depends on it", error)
            self._complained = True
            return None

    def _write_locally(self, data: bytes) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._folder / progress_name(self._worker_id)) as file:
                file.write(data)


def _ending(error: BaseException) -> tuple[str, str, int] | None:
    """Status, message and exit code of the last record; None for no record."""
    if isinstance(error, WriterConflictError):
        return None
    status = TERMINATED if isinstance(error, TerminatedError) else FAILED
    code = error.exit_code if isinstance(error, ToolkitError) else 1
    return status, one_line(str(error)) or type(error).__name__, code
