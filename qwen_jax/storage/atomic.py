"""Files that are whole or not there: written beside their name, synced, then renamed."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_jax.files import storage_errors
from qwen_jax.storage.checksum import RunningCrc32c

TEMP_SUFFIX = ".tmp"
"""A file that ends so is a dead writer's; it may be deleted."""

_WRITEBACK_BYTES = 8 << 20


class AtomicFile:
    """A file that gets its name at the end: see `atomic_write`, which is this as a `with` block.

    Attributes: path (the name to come), and `size` and `crc32c` of everything written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._running = RunningCrc32c()
        self._written_back = 0
        with storage_errors("write", path):
            self._file = open(_temp_path(path), "wb", opener=no_link)  # noqa: SIM115 - closed by commit or discard

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._running.size

    @property
    def crc32c(self) -> str:
        """Their crc32c in the spelling of GCS."""
        return self._running.crc32c

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Writes bytes; raises StorageError."""
        with storage_errors("write", self.path):
            self._file.write(data)
            self._start_writeback()
        self._running.update(data)
        return memoryview(data).nbytes

    def _start_writeback(self) -> None:
        """Sets the disk to work on what was written, or it would begin at the sync, when all else is done."""
        end = self._file.tell()
        if end - self._written_back >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):  # absent on macOS
            # For pages that are not on the disk yet Linux takes this as: start to write, and keep them.
            length = end - self._written_back
            os.posix_fadvise(self._file.fileno(), self._written_back, length, os.POSIX_FADV_DONTNEED)
            self._written_back = end

    def finish(self) -> None:
        """Makes the bytes durable, then gives them their name; on an error removes them."""
        try:
            self._finish()
        except BaseException:
            self.discard()
            raise

    def _finish(self) -> None:
        with storage_errors("write", self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.rename(_temp_path(self.path), self.path)
            sync_folder(self.path.parent)

    def discard(self) -> None:
        """Removes the unfinished file; never raises, as it runs while another error is on its way."""
        # close() flushes, so on a full disk it fails again; the file is to go in any case.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(_temp_path(self.path))


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[AtomicFile]:
    """A binary file for writing that appears under `path` whole, or not at all.

    The bytes go to `path` + ".tmp"; when the `with` block ends they are synced and renamed, and the folder is
    synced. An exception inside the block removes the temporary file and leaves an older `path` as it was.

    Raises:
        StorageError: full disk, missing or read-only folder ..., with the path and what to do.
    """
    file = AtomicFile(Path(path))
    try:
        yield file
    except BaseException:
        file.discard()
        raise
    file.finish()


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes JSON atomically, the same bytes for the same object; raises StorageError."""
    with atomic_write(path) as file:
        file.write(json_bytes(obj))


def json_bytes(obj: Any) -> bytes:
    """`obj` as our JSON files spell it: keys in the order given, indent 2, one newline at the end."""
    return (json.dumps(obj, indent=2, allow_nan=False) + "\n").encode()


def no_link(path: str, flags: int) -> int:
    """Opens a file of ours, for `open`: a link that somebody has put in its place is refused, not followed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync_folder(folder: str | os.PathLike) -> None:
    """Makes names in `folder` durable, as fsync of a file does not; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temp_path(path: Path) -> Path:
    return path.with_name(path.name + TEMP_SUFFIX)
