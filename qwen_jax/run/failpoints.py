"""Named places where a worker kills itself, for tests that prove that dying there does no harm.

Off unless the variable QWEN_JAX_FAILPOINT says `name`, or `name:n` for the n-th time that it is passed. With
`name:n:stop` it is stopped there (SIGSTOP) instead, until it is sent SIGCONT.
"""

import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import UsageError

VARIABLE = "QWEN_JAX_FAILPOINT"

NAMES = {
    "resumed": "the start knows what is durable and has changed nothing yet",
    "opened": "a new run has marked its folder and bucket as its own",
    "shard_half_written": "half of the shard's temporary file is on the disk",
    "shard_written": "all of it, but not under its final name",
    "shard_named": "the shard has its final name on the local disk",
    "shard_described": "the local metadata lists the shard, the bucket does not have it",
    "stats_uploaded": "its statistics are in the bucket, the shard is not",
    "shard_uploaded": "the shard is too, and nothing there lists it",
    "metadata_local": "the local metadata is up to date",
    "metadata_stored": "the bucket's metadata is up to date, its checkpoint is not",
    "checkpoint_stored": "the bucket's checkpoint is up to date, the local one is not",
    "checkpoint_local": "one commit is complete",
    "adopting": "a shard that an earlier run kept is about to be uploaded",
    "completing": "all shards are committed, the run is not marked as completed",
}

_SIGNALS = {"": signal.SIGKILL, "stop": signal.SIGSTOP}

# Passes that are left until the signal, by name; empty in every ordinary run.
_armed: dict[str, int] = {}
_signal = signal.SIGKILL
_passing = threading.Lock()


def arm(environment: Mapping[str, str]) -> None:
    """Reads the variable; raises UsageError for what it cannot say."""
    global _signal
    _armed.clear()
    text = environment.get(VARIABLE)
    if not text:
        return
    name, _, rest = text.partition(":")
    count, _, how = rest.partition(":")
    if name not in NAMES or not (count or "1").isdecimal() or int(count or 1) < 1 or how not in _SIGNALS:
        names = ", ".join(NAMES)
        raise UsageError(f"{VARIABLE} must be NAME, NAME:N or NAME:N:stop with one of {names}; got {text!r}")
    _armed[name], _signal = int(count or 1), _SIGNALS[how]


def failpoint(name: str) -> None:
    """Dies or is stopped here if armed for this name and this pass."""
    if name in _armed:
        with _passing:
            _armed[name] -= 1
            if _armed[name] == 0:
                os.kill(os.getpid(), _signal)


def through_failpoint(file: Any) -> Any:
    """`file`, or when `shard_half_written` is armed one that passes it in the middle of every write."""
    return _HalfWritten(file) if "shard_half_written" in _armed else file


class _HalfWritten:
    def __init__(self, file: Any):
        self._file = file

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Writes in two halves, if it lives that long."""
        view = memoryview(data).cast("B")
        half = len(view) // 2
        written = self._file.write(view[:half])
        failpoint("shard_half_written")
        return written + self._file.write(view[half:])
