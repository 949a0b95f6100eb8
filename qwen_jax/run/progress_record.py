"""Writes the worker's progress record: at most once a minute, from a thread of its own, at best effort."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from qwen_jax.errors import TerminatedError, ToolkitError, UsageError
from qwen_jax.fleet.records import ENDED, FAILED, RUNNING, TERMINATED, ProgressRecord, progress_name
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


class ProgressWriter:
    """Writes records while the `with` block runs, and a last one that says how it ended.

    Whatever goes wrong with them is logged once and otherwise ignored; the end waits for the last record no longer
    than two seconds.
    """

    def __init__(
        self,
        snapshot: Callable[[], ProgressRecord],
        folder: Path | None,
        bucket_url: str | None,
        interval_s: float,
    ):
        """snapshot: the record as of now. folder: of the checkpoint, None for no local record."""
        self._snapshot = snapshot
        self._folder = folder
        self._bucket_url = bucket_url
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._give_up = threading.Event()
        self._ended_as: tuple[str, str, int | None] = (ENDED, "", 0)
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if self._interval_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            status = TERMINATED if isinstance(error, TerminatedError) else FAILED
            code = error.exit_code if isinstance(error, ToolkitError) else 1
            self._ended_as = (status, str(error) or kind.__name__, code)
        self._stop.set()
        if self._interval_s:
            self._thread.join(_LAST_WRITE_S)
        self._give_up.set()

    def _run(self) -> None:
        history: list[list[float]] = []
        ended = False
        while not ended:
            ended = self._stop.wait(self._interval_s)
            record = self._snapshot()
            outcome = self._ended_as if ended else (RUNNING, "", None)
            record.status, record.message, record.exit_code = outcome
            record.history = history
            record.add_point(time.time())
            history = record.history
            self._write(record)

    def _write(self, record: ProgressRecord) -> None:
        try:
            data = record.to_bytes()
            if self._folder is not None:
                with atomic_write(self._folder / progress_name(record.worker_id)) as file:
                    file.write(data)
            if self._bucket_url is not None:
                # A store of its own, so that its waits and retries are nobody else's.
                open_store(self._bucket_url, stop=self._give_up).put_bytes(progress_name(), data)
        except Exception as error:  # noqa: BLE001  (a record must never fail a run)
            if not self._complained and not self._give_up.is_set():
                log.warning("the progress record cannot be written (%s); the run goes on", error)
            self._complained = True
