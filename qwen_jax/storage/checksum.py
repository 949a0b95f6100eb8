"""crc32c as Google Cloud Storage spells it: base64 of four big-endian bytes."""

import base64
import os

import google_crc32c

_CHUNK_BYTES = 1 << 20


class RunningCrc32c:
    """Size and crc32c of bytes as they pass by."""

    def __init__(self) -> None:
        self.size = 0
        self._checksum = google_crc32c.Checksum()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Takes the next bytes."""
        self.size += memoryview(data).nbytes
        if isinstance(data, bytes):
            self._checksum.update(data)
            return
        # The C code takes bytes only; memoryviews of arrays come in pieces, so the copies stay small.
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            self._checksum.update(bytes(view[start : start + _CHUNK_BYTES]))

    @property
    def crc32c(self) -> str:
        """The checksum so far, as GCS shows it, for example `AAAAAA==` for no bytes."""
        return base64.b64encode(self._checksum.digest()).decode()


def crc32c_of(data: bytes | bytearray | memoryview) -> str:
    """The crc32c of bytes in memory, in the spelling of GCS."""
    running = RunningCrc32c()
    running.update(data)
    return running.crc32c


def file_crc32c(path: str | os.PathLike) -> tuple[int, str]:
    """Size in bytes and crc32c of a file; raises OSError as `open` does."""
    running = RunningCrc32c()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            running.update(chunk)
    return running.size, running.crc32c
