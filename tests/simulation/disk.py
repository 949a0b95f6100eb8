"""A machine's disk in memory, with what a crash leaves of it.

What was written is lost when the power fails, unless it was synced; so is a name, unless its folder was. The real
code sees it through `DiskOs` and `open_file`, which stand in for `os` and `open`, and through `SimPath`.
"""

import errno
import fnmatch
import os
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Self


class Inode:
    """A file's bytes: as the machine sees them, and as they are on the plate (None: not at all)."""

    __slots__ = ("data", "synced")

    def __init__(self, data: bytes = b"", synced: bytes | None = None):
        self.data = data
        self.synced = synced


class Disk:
    """Names and what they lead to: as the machine sees them, and on the plate."""

    def __init__(self) -> None:
        self.names: dict[str, Inode] = {}
        self.durable: dict[str, Inode] = {}

    def sync_folder(self, folder: str) -> None:
        """Makes the names right in a folder durable."""
        for name in [*self.names, *self.durable]:
            if name.rpartition("/")[0] == folder:
                if name in self.names:
                    self.durable[name] = self.names[name]
                else:
                    self.durable.pop(name, None)

    def lose_power(self, rng: random.Random) -> None:
        """Of whatever was not synced anything may be left, in any combination."""
        left = {}
        for name in sorted({*self.names, *self.durable}):
            versions = (self.names.get(name), self.durable.get(name))
            inode = versions[0] if versions[0] is versions[1] else rng.choice(versions)
            if inode is not None:
                left[name] = inode
        for inode in left.values():
            if inode.data != inode.synced:
                cut = rng.randrange(len(inode.data) + 1)
                inode.data = rng.choice((inode.synced or b"", inode.data[:cut], bytes(len(inode.data))))
            inode.synced = inode.data
        self.names, self.durable = left, dict(left)

    def vanish(self) -> None:
        self.names, self.durable = {}, {}


class Machines:
    """Finds the disk of a path by its first part, and asks before each operation that changes one."""

    def __init__(self) -> None:
        self.disks: dict[str, Disk] = {}
        self.before: Callable[[str], str | None] = lambda what: None

    def of(self, path: str) -> Disk:
        return self.disks[path.split("/", 2)[1]]


machines = Machines()


def change(what: str, path: str) -> Disk:
    """A step of the simulation; raises OSError where it is to fail."""
    trouble = machines.before(f"{what} {path}")
    if trouble is not None:
        code = errno.ENOSPC if trouble == "full" else errno.EIO
        raise OSError(code, os.strerror(code))
    return machines.of(path)


class SimFile:
    """What `open` returns; bytes reach the disk when they are flushed, as with a real buffered file."""

    def __init__(self, path: str, mode: str):
        self._path, self._waiting, self._at = path, b"", 0
        self._written = 0
        if "w" in mode:
            self._inode = change("create", path).names.setdefault(path, Inode())
            self._inode.data = b""
        else:
            self._inode = find(path)

    def write(self, data: bytes) -> int:
        self._waiting += bytes(data)
        return len(data)

    def flush(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, b""
            half = len(waiting) // 2
            self._inode.data += waiting[:half]
            change("write", self._path)
            self._inode.data += waiting[half:]

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = 0) -> int:
        self._at = position + (len(self._inode.data) if whence == 2 else 0)
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._inode.data) if size < 0 else self._at + size
        data = self._inode.data[self._at : end]
        self._at += len(data)
        return data

    def fileno(self) -> "SimFile":
        return self

    def sync(self) -> None:
        change("sync", self._path)
        self._inode.synced = self._inode.data

    def close(self) -> None:
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SimFolder:
    """An open folder."""

    def __init__(self, path: str):
        self._path = path

    def sync(self) -> None:
        change("sync folder", self._path).sync_folder(self._path)


def find(path: str) -> Inode:
    inode = machines.of(path).names.get(path)
    if inode is None:
        raise FileNotFoundError(errno.ENOENT, "No such file", path)
    return inode


def open_file(path: Any, mode: str = "r", **_: Any) -> SimFile:
    return SimFile(str(path), mode)


class SimPath(str):
    """The part of pathlib.Path that the protocol uses; a string, which is fast."""

    __slots__ = ()

    def __truediv__(self, name: str) -> "SimPath":
        return SimPath(f"{self}/{name}")

    @property
    def name(self) -> str:
        return self.rpartition("/")[2]

    @property
    def parent(self) -> "SimPath":
        return SimPath(self.rpartition("/")[0])

    def with_name(self, name: str) -> "SimPath":
        return self.parent / name

    def exists(self) -> bool:
        return self in machines.of(self).names

    def read_bytes(self) -> bytes:
        return find(self).data

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=len(find(self).data))

    def unlink(self, missing_ok: bool = False) -> None:
        if not (missing_ok and not self.exists()):
            find(self)
            change("unlink", self).names.pop(self)

    def glob(self, pattern: str) -> list["SimPath"]:
        return [
            SimPath(name)
            for name in list(machines.of(self).names)
            if name.rpartition("/")[0] == self and fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)
        ]


def _rename(old: Any, new: Any) -> None:
    disk = change("rename", str(new))
    find(str(old))
    disk.names[str(new)] = disk.names.pop(str(old))


DiskOs = SimpleNamespace(
    PathLike=os.PathLike,
    fspath=str,
    fsync=lambda file: file.sync(),
    open=lambda path, flags: SimFolder(str(path)),
    close=lambda folder: None,
    rename=_rename,
    replace=_rename,
    unlink=lambda path: SimPath(path).unlink(),
    O_RDONLY=os.O_RDONLY,
    O_DIRECTORY=os.O_DIRECTORY,
)
