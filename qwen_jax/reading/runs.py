"""Where shards lie: one worker's folder, many workers', a bucket, or a single file."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from qwen_jax.errors import BadDataError, StorageError

METADATA_NAME = "metadata.json"
_SHARD = re.compile(r"shard_\d{4,}\.pkl\.gz")


class Place(Protocol):
    """Files of one worker, wherever they lie."""

    where: str

    def names(self) -> list[str]:
        """All files, sorted."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file's content; None if it is not there."""
        ...

    def local(self, name: str) -> Any:
        """A context manager that gives the file's path on this machine; raises BadDataError if it is not there."""
        ...

    def describe(self, name: str) -> tuple[int, str]:
        """Size in bytes and crc32c (base64) of what is stored."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Puts a small file in the place of the one that is there."""
        ...


class Folder:
    """A Place on the local disk."""

    def __init__(self, path: Path):
        self.path = path
        self.where = str(path)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir() if path.is_file())

    def read(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        yield self.path / name

    def describe(self, name: str) -> tuple[int, str]:
        from qwen_jax.storage.checksum import file_crc32c

        return file_crc32c(self.path / name)

    def replace(self, name: str, data: bytes) -> None:
        from qwen_jax.storage.local import atomic_write

        with atomic_write(self.path / name) as file:
            file.write(data)


class Bucket:
    """A Place in a bucket; a shard is copied to a temporary file while it is read."""

    def __init__(self, store: Any):
        self._store = store
        self.where = store.url

    def names(self) -> list[str]:
        return sorted(info.name for info in self._store.list() if "/" not in info.name)

    def read(self, name: str) -> bytes | None:
        stored = self._store.get_bytes(name)
        return stored[0] if stored else None

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / name
            if self._store.download_file(name, copy) is None:
                raise BadDataError(f"{self.where}/{name} is not there")
            yield copy

    def describe(self, name: str) -> tuple[int, str]:
        info = self._store.stat(name)
        if info is None:
            raise BadDataError(f"{self.where}/{name} is not there")
        return info.size, info.crc32c

    def replace(self, name: str, data: bytes) -> None:
        present = self._store.stat(name)
        self._store.put_bytes(name, data, if_generation=present.generation if present else 0)


class Run:
    """The shards of one worker. metadata: its metadata.json, None for shards without one.

    shards: their names in order; those that metadata.json lists, else those that are there.
    """

    def __init__(self, place: Place, shards: list[str] | None = None):
        self.place = place
        self.metadata = None if shards else self._read_metadata()
        if self.metadata is not None:
            self.shards = [entry["filename"] for entry in self.metadata["shards"]]
        else:
            self.shards = shards or [name for name in place.names() if _SHARD.fullmatch(name)]

    @property
    def where(self) -> str:
        return self.place.where

    @property
    def kinds(self) -> list[str]:
        """What is stored of a layer, the main kind first."""
        about = self.metadata or {}
        return about.get("activation_types") or [about.get("activation_type", "residual")]

    def _read_metadata(self) -> dict[str, Any] | None:
        data = self.place.read(METADATA_NAME)
        if data is None:
            return None
        try:
            metadata = json.loads(data)
            [entry["filename"] for entry in metadata["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadDataError(
                f"{self.where}/{METADATA_NAME} is damaged ({error!r}); start the worker again, which mends it"
            ) from error
        return metadata


def open_runs(path: str | Path) -> list[Run]:
    """The runs at `path`, by worker.

    path: a shard file, a worker's folder, a folder of workers' folders, or the same in a bucket (`gs://...`,
    `file:///...`). Raises BadDataError where there are no shards and no metadata.json.
    """
    places = _bucket_places(str(path)) if str(path).startswith("gs://") else _local_places(Path(_plain(path)))
    runs = [place if isinstance(place, Run) else Run(place) for place in places]
    if not runs:
        raise BadDataError(
            f"{path} holds no shards and no metadata.json; give a shard file, a worker's folder, or the folder "
            "above the workers' folders"
        )
    return runs


def _plain(path: str | Path) -> str:
    parts = urlsplit(str(path))
    return unquote(parts.path) if parts.scheme == "file" else str(path)


def _local_places(path: Path) -> list[Folder | Run]:
    if path.is_file():
        return [Run(Folder(path.parent), [path.name])]
    if not path.is_dir():
        raise StorageError(f"{path} is not there; give an existing file, folder or gs:// address")
    folders = [path, *sorted((each for each in path.iterdir() if each.is_dir()), key=_by_number)]
    return [Folder(folder) for folder in folders if _has_run(Folder(folder).names())]


def _bucket_places(url: str) -> list[Bucket | Run]:
    from qwen_jax.storage.opening import open_store

    if _SHARD.fullmatch(url.rpartition("/")[2]):
        above, _, name = url.rpartition("/")
        return [Run(Bucket(open_store(above)), [name])]
    names: dict[str, list[str]] = {}
    for info in open_store(url).list():
        folder, _, name = info.name.rpartition("/")
        names.setdefault(folder, []).append(name)
    folders = sorted(
        (folder for folder in names if _has_run(names[folder])), key=lambda each: _by_number(Path(each))
    )
    return [Bucket(open_store(f"{url.rstrip('/')}/{folder}".rstrip("/"))) for folder in folders]


def _has_run(names: list[str]) -> bool:
    return METADATA_NAME in names or any(map(_SHARD.fullmatch, names))


def _by_number(path: Path) -> tuple[int, str]:
    number = re.search(r"\d+$", path.name)
    return int(number.group()) if number else -1, path.name
