"""The files that workers leave, to be read where they lie: in folders of this machine, or in a store."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from qwen_jax.ledger.checks import read_bounded
from qwen_jax.ledger.names import METADATA_NAME, bucket_folder, checkpoint_name, local_folder, progress_name


class Files(Protocol):
    """Files side by side. where: the folder, or its URL."""

    where: str

    def names(self) -> list[str]:
        """All files, sorted."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file's content; None if it is not there. Raises OSError or StorageError."""
        ...


class FolderFiles:
    """Those of a local folder."""

    def __init__(self, path: Path):
        self.path = path
        self.where = str(path)

    def names(self) -> list[str]:
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())

    def read(self, name: str) -> bytes | None:
        try:
            return read_bounded(self.path / name)
        except (FileNotFoundError, NotADirectoryError):
            return None


class StoreFiles:
    """Those of a storage.store.Store, whose URL may lie above the folders of several workers."""

    def __init__(self, store: Any):
        self._store = store
        self.where = store.url

    def names(self) -> list[str]:
        return sorted(info.name for info in self._store.list() if "/" not in info.name)

    def read(self, name: str) -> bytes | None:
        stored = self._store.get_bytes(name)
        return stored[0] if stored else None


@dataclass(frozen=True)
class File:
    """One of some files, there or not; str says where."""

    files: Files
    name: str

    def read(self) -> bytes | None:
        return self.files.read(self.name)

    def __str__(self) -> str:
        return f"{self.files.where.rstrip('/')}/{self.name}"


@dataclass(frozen=True)
class WorkerFiles:
    """What tells how far a worker is."""

    worker: int
    checkpoint: File
    progress: File
    metadata: File

    @classmethod
    def local(cls, checkpoint_dir: Path, output_dir: Path, worker: int) -> Self:
        """On this machine: marker and record of all workers lie in one folder."""
        markers, output = FolderFiles(checkpoint_dir), FolderFiles(output_dir)
        return cls(
            worker,
            File(markers, checkpoint_name(worker)),
            File(markers, progress_name(worker)),
            File(output, f"{local_folder(worker)}/{METADATA_NAME}"),
        )

    @classmethod
    def stored(cls, files: Files, worker: int) -> Self:
        """In a bucket. files: what lies above tpu_0, tpu_1, ..."""
        names = (checkpoint_name(worker), progress_name(), METADATA_NAME)
        return cls(worker, *(File(files, f"{bucket_folder(worker)}/{name}") for name in names))
