"""Writes the worker's progress record: at most once a minute, from a thread of its own, at best effort."""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from qwen_jax.errors import TerminatedError, ToolkitError, UsageError, WriterConflictError
from qwen_jax.fleet.records import ENDED, FAILED, RUNNING, TERMINATED, ProgressRecord, progress_name
from qwen_jax.run.settings import Settings
from qwen_jax.storage.local import atomic_write
from qwen_jax.storage.opening import open_store

log = logging.getLogger(__name__)

INTERVAL_VARIABLE = "PROGRESS_INTERVAL_S"
_DEFAULT_INTERVAL_S = 60.0
_LAST_WRITE_S = 2.0


def record_interval(environment: dict[str, str]) -> float:
    """Seconds between records; 0 writes none. Raises UsageError for what is no number."""
    text = environment.get(INTERVAL_VARIABLE, "")
    try:
        interval = float(text) if text else _DEFAULT_INTERVAL_S
    except ValueError:
        interval = -1.0
    if not 0 <= interval < 1e9:
        raise UsageError(f"{INTERVAL_VARIABLE} must be a number of seconds, 0 for no record; got {text!r}")
    return interval


def record_writer(settings: Settings) -> "ProgressWriter":
    """For the worker of these settings; nothing is done yet."""

    def nothing_yet() -> ProgressRecord:
        now = time.time()
        return ProgressRecord(settings.worker_id, RUNNING, 0, 0, 0, 0, 0, now, now)

    folder = settings.checkpoint_dir if settings.checkpointing else None
    return ProgressWriter(nothing_yet, folder, settings.bucket_url, record_interval(dict(os.environ)))


def leave_failure(settings: Settings, message: str, exit_code: int) -> None:
    """Leaves a record of a worker that is not started, because of `message`."""
    error = ToolkitError(message)
    error.exit_code = exit_code
    with suppress(ToolkitError), record_writer(settings):
        raise error


class ProgressWriter:
    """Writes records from `follow` to the end of the `with` block, and a last one that says how it ended.

    A block that fails before `follow` leaves a record too. After a WriterConflictError there is none: it is then the
    other writer's. Whatever goes wrong with records is logged once and otherwise ignored; the end waits for the last
    one no longer than two seconds.
    """

    def __init__(
        self,
        snapshot: Callable[[], ProgressRecord],
        folder: Path | None,
        bucket_url: str | None,
        interval_s: float,
    ):
        """snapshot: the record until `follow` gives another. folder: of the checkpoint, None for no local record."""
        self._snapshot = snapshot
        self._folder = folder
        self._bucket_url = bucket_url
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._give_up = threading.Event()
        self._ended_as: tuple[str, str, int | None] | None = (ENDED, "", 0)
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def follow(self, snapshot: Callable[[], ProgressRecord]) -> None:
        """From now on the record is this one, at every interval."""
        self._snapshot = snapshot
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._ended_as = _ending(error)
            if not self._has_begun:
                self._begin()
        self._stop.set()
        if self._has_begun:
            self._thread.join(_LAST_WRITE_S)
        self._give_up.set()

    @property
    def _has_begun(self) -> bool:
        return self._thread.ident is not None

    def _begin(self) -> None:
        if self._interval_s:
            self._thread.start()

    def _run(self) -> None:
        history: list[list[float]] = []
        ended = False
        while not ended:
            ended = self._stop.wait(self._interval_s)
            outcome = self._ended_as if ended else (RUNNING, "", None)
            if outcome is None:
                return
            record = self._snapshot()
            record.status, record.message, record.exit_code = outcome
            record.history = history
            record.add_point(time.time())
            history = record.history
            self._write(record)

    def _write(self, record: ProgressRecord) -> None:
        data = record.to_bytes()
        for write in (self._write_locally, self._write_to_bucket):
            try:
                write(record.worker_id, data)
            except Exception as error:  # noqa: BLE001  (a record must never fail a run)
                if not self._complained and not self._give_up.is_set():
                    log.warning(
                        "the progress record cannot be written (%s); nothing else depends on it", error
                    )
                self._complained = True

    def _write_locally(self, worker_id: int, data: bytes) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._folder / progress_name(worker_id)) as file:
                file.write(data)

    def _write_to_bucket(self, worker_id: int, data: bytes) -> None:
        if self._bucket_url is not None:
            # A store of its own, so that its waits and retries are nobody else's.
            open_store(self._bucket_url, stop=self._give_up).put_bytes(progress_name(), data)


def _ending(error: BaseException) -> tuple[str, str, int] | None:
    """Status, message and exit code of the last record; None for no record."""
    if isinstance(error, WriterConflictError):
        return None
    status = TERMINATED if isinstance(error, TerminatedError) else FAILED
    code = error.exit_code if isinstance(error, ToolkitError) else 1
    return status, str(error) or type(error).__name__, code
