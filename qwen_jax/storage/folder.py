"""A local folder that stands in for a bucket: the same conditions, the same errors, no network."""

import contextlib
import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from qwen_jax.errors import StorageError, TerminatedError, UsageError
from qwen_jax.files import storage_errors
from qwen_jax.ledger.checks import DamagedError, list_of, or_null, parse, record, text, whole
from qwen_jax.ledger.schema import CRC32C
from qwen_jax.storage.atomic import AtomicFile, atomic_write, sync_folder, write_json
from qwen_jax.storage.checksum import crc32c_of, file_crc32c
from qwen_jax.storage.store import ObjectInfo, accept_or_conflict, check_small, conflict

HIDDEN = ".store"
"""Folder for the lock, the generation counter and what the file system does not know about an object."""

_SIDECAR = record(
    {
        "generation": whole(1, 2**63),
        "crc32c": CRC32C,
        "writer": or_null(text()),
        "identity": list_of(whole(most=2**64)),
    }
)
_LOCK_POLL_S = 0.02
_COPY_BYTES = 1 << 20


class FolderStore:
    """Implements Store (see there) on a folder that several processes may share.

    Everything happens under one lock file, so it suits tests and single machines, not a fleet. Objects
    put there by other means (cp) are adopted: they get a generation when they are first looked at.
    """

    def __init__(self, root: str | os.PathLike, *, stop: threading.Event | None = None):
        self._root = Path(root).absolute()
        self._hidden = self._root / HIDDEN
        self._stop = stop or threading.Event()
        self.url = self._root.as_uri()
        with storage_errors("make the folder", self._hidden):
            (self._hidden / "objects").mkdir(parents=True, exist_ok=True)

    def put_bytes(
        self, name: str, data: bytes, if_generation: int | None = None, *, writer: str | None = None
    ) -> ObjectInfo:
        wanted = ObjectInfo(name, len(data), crc32c_of(data), 0, writer)
        return self._put(wanted, lambda file: file.write(data), if_generation)

    def put_file(
        self,
        name: str,
        path: str | os.PathLike,
        if_generation: int | None = None,
        *,
        writer: str | None = None,
    ) -> ObjectInfo:
        def copy(target: AtomicFile) -> None:
            with open(path, "rb") as source:
                while chunk := source.read(_COPY_BYTES):
                    target.write(chunk)

        with storage_errors("read", path):
            wanted = ObjectInfo(name, *file_crc32c(path), 0, writer)
            return self._put(wanted, copy, if_generation)

    def get_bytes(self, name: str) -> tuple[bytes, ObjectInfo] | None:
        path = self._path(name)
        with self._locked(), storage_errors("read", path):
            info = self._info(name)
            if info is None:
                return None
            check_small(info, self.url)
            return path.read_bytes(), info

    def download_file(self, name: str, path: str | os.PathLike) -> ObjectInfo | None:
        source = self._path(name)
        with self._locked(), storage_errors("read", source):
            info = self._info(name)
            if info is None:
                return None
            with open(source, "rb") as file, atomic_write(path) as target:
                while chunk := file.read(_COPY_BYTES):
                    target.write(chunk)
                if target.crc32c != info.crc32c:
                    raise StorageError(
                        f"{source} does not match its recorded crc32c {info.crc32c}: restore it"
                    )
            return info

    def stat(self, name: str) -> ObjectInfo | None:
        with self._locked(), storage_errors("read", self._path(name)):
            return self._info(name)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._locked(), storage_errors("list", self._root):
            names = [name for name in self._names() if name.startswith(prefix)]
            infos = [self._info(name) for name in sorted(names, key=str.encode)]
        return iter([info for info in infos if info])

    def delete(self, name: str, if_generation: int | None = None) -> None:
        path = self._path(name)
        with self._locked(), storage_errors("delete", path):
            present = self._info(name)
            if present is None:
                return
            if if_generation is not None and present.generation != if_generation:
                raise conflict(name, if_generation, present, self.url)
            path.unlink()
            sync_folder(path.parent)
            self._sidecar(name).unlink(missing_ok=True)

    def _put(
        self, wanted: ObjectInfo, fill: Callable[[AtomicFile], object], if_generation: int | None
    ) -> ObjectInfo:
        path = self._path(wanted.name)
        with self._locked(), storage_errors("write", path):
            present = self._info(wanted.name)
            if if_generation is not None and (present.generation if present else 0) != if_generation:
                return accept_or_conflict(wanted, if_generation, present, self.url)
            # The name is fixed: what a killed process left there is overwritten by the next one.
            staged = self._hidden / "staged"
            with atomic_write(staged) as file:
                fill(file)
            if file.crc32c != wanted.crc32c:
                raise StorageError(f"the source of {path} changed while it was copied: start again")
            path.parent.mkdir(parents=True, exist_ok=True)
            generation = self._next_generation()
            os.replace(staged, path)
            sync_folder(path.parent)
            # Killed before the next line, the object is adopted later, under a new generation.
            return self._record(wanted, generation, path.stat())

    def _record(self, wanted: ObjectInfo, generation: int, status: os.stat_result) -> ObjectInfo:
        info = ObjectInfo(wanted.name, wanted.size, wanted.crc32c, generation, wanted.writer)
        sidecar = {
            "generation": generation,
            "crc32c": info.crc32c,
            "writer": info.writer,
            "identity": _identity(status),
        }
        write_json(self._sidecar(info.name), sidecar)
        return info

    def _info(self, name: str) -> ObjectInfo | None:
        path = self._path(name)
        if not path.is_file():
            return None
        status = path.stat()
        try:
            sidecar = parse(self._sidecar(name).read_bytes(), _SIDECAR)
            if sidecar["identity"] == _identity(status):
                return ObjectInfo(
                    name, status.st_size, sidecar["crc32c"], sidecar["generation"], sidecar["writer"]
                )
        except (FileNotFoundError, DamagedError):
            pass  # no record, or not one of ours: adopt the file as it is
        size, crc32c = file_crc32c(path)
        return self._record(ObjectInfo(name, size, crc32c, 0), self._next_generation(), status)

    def _next_generation(self) -> int:
        counter = self._hidden / "generation"
        try:
            generation = int(counter.read_text()) + 1
        except (FileNotFoundError, ValueError):
            # Somewhere random: whoever still holds a generation from before the loss must not meet it again.
            generation = secrets.randbits(48) + 1
        with atomic_write(counter) as file:
            file.write(str(generation).encode())
        return generation

    def _names(self) -> Iterator[str]:
        for folder, subfolders, files in os.walk(self._root):
            if Path(folder) == self._root and HIDDEN in subfolders:
                subfolders.remove(HIDDEN)
            for file in files:
                yield (Path(folder) / file).relative_to(self._root).as_posix()

    def _path(self, name: str) -> Path:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or parts[0] == HIDDEN or "\0" in name:
            raise UsageError(f"{name!r} cannot be the name of an object")
        return self._root / name

    def _sidecar(self, name: str) -> Path:
        return self._hidden / "objects" / (quote(name, safe="") + ".json")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with storage_errors("lock", self._hidden), open(self._hidden / "lock", "ab") as file:
            while not _try_lock(file.fileno()):
                if self._stop.wait(_LOCK_POLL_S):
                    raise TerminatedError(f"stopped while waiting for the lock of {self.url}")
            yield


def _identity(status: os.stat_result) -> list[int]:
    """Tells a file from one that was put in its place; a replacement has another inode at least."""
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
