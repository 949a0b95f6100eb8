"""Where shards lie: one worker's folder, many workers', a bucket, or a single file."""

import logging
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from qwen_jax.errors import BadDataError, StorageError, UsageError
from qwen_jax.files import plain_path
from qwen_jax.ledger.checks import DamagedError, read_bounded
from qwen_jax.ledger.metadata import Ledger, parse_metadata
from qwen_jax.ledger.names import METADATA_NAME, shard_number
from qwen_jax.ledger.worker_files import Files, FolderFiles, StoreFiles
from qwen_jax.shards import EMBEDDING, shard_layers
from qwen_jax.shards.compress import MalformedError
from qwen_jax.shards.parts import TAIL_BYTES, parse_index, ranges, wanted_parts

UNKNOWN_KIND = "activation"
"""The kind of what a shard holds where no metadata.json says it."""
_FOLDERS_DEEP = 3
_MOST_RANGES = 4
"""Requests for a shard's parts, behind the two for what it is and where they lie."""
_TRIES = 5
HOW_TO_RESTORE = (
    "a start of the worker restores it where a whole copy lies in its bucket or on its disk; else put a copy of "
    "your own there, or start over with --force_restart"
)
"""What to do about a metadata.json that cannot be used."""

log = logging.getLogger(__name__)


class RunFiles(Files, Protocol):
    """Files of one worker, wherever they lie."""

    def local(self, name: str, layers: Collection[int | str] | None = None) -> Any:
        """A context manager that gives the file's path on this machine; raises BadDataError if it is not there.

        layers: of a shard, those that will be read; of a copy the rest may be missing. None is all of it.
        """
        ...

    def describe(self, name: str) -> tuple[int, str]:
        """Size in bytes and crc32c (base64) of what is stored; raises BadDataError if it is not there."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Puts a small file in the place of the one that is there."""
        ...


class LocalFiles(FolderFiles):
    """RunFiles in a local folder."""

    def read(self, name: str) -> bytes | None:
        return super().read(name) if (self.path / name).is_file() else None

    @contextmanager
    def local(self, name: str, layers: Collection[int | str] | None = None) -> Iterator[Path]:
        yield self._present(name)

    def describe(self, name: str) -> tuple[int, str]:
        from qwen_jax.storage.checksum import file_crc32c

        return file_crc32c(self._present(name))

    def replace(self, name: str, data: bytes) -> None:
        from qwen_jax.storage.atomic import atomic_write

        with atomic_write(self.path / name) as file:
            file.write(data)

    def _present(self, name: str) -> Path:
        if not (self.path / name).is_file():
            raise BadDataError(f"{self.where}/{name} is not there")
        return self.path / name


class BucketFiles(StoreFiles):
    """RunFiles in a bucket; what is wanted of a shard is copied to a temporary file while it is read."""

    @contextmanager
    def local(self, name: str, layers: Collection[int | str] | None = None) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / name
            in_parts = layers is not None and self._fetch_layers(name, layers, copy)
            if not in_parts and self._store.download_file(name, copy) is None:
                raise self._absent(name)
            yield copy

    def _fetch_layers(self, name: str, layers: Collection[int | str], copy: Path) -> bool:
        """Fetches what of a shard these layers take, to where it lies in the shard, all of one generation; False where
        the shard does not say where they lie."""
        from qwen_jax.storage.store import ReplacedError

        for _ in range(_TRIES):
            try:
                return self._fetch_generation(self._stat(name), layers, copy)
            except ReplacedError as error:
                log.warning("%s; reading the new one", error)
        raise StorageError(f"{self.where}/{name} was replaced each time that it was read; start again")

    def _fetch_generation(self, info: Any, layers: Collection[int | str], copy: Path) -> bool:
        tail_start = max(0, info.size - TAIL_BYTES)
        with open(copy, "wb+") as file:

            def fetch(start: int, end: int) -> None:
                file.seek(start)
                if start < end:
                    self._store.download_range(info, start, end, file)

            fetch(tail_start, info.size)
            file.seek(tail_start)
            try:
                parts = parse_index(file.read(), info.size)
            except MalformedError as error:
                raise BadDataError(f"{self.where}/{info.name} {error}; fetch or extract it again") from error
            if not parts:
                return False
            for start, end in ranges(wanted_parts(parts, layers), _MOST_RANGES):
                fetch(start, min(end, tail_start))
        return True

    def _stat(self, name: str) -> Any:
        info = self._store.stat(name)
        if info is None:
            raise self._absent(name)
        return info

    def _absent(self, name: str) -> BadDataError:
        return BadDataError(f"{self.where}/{name} is not there")

    def describe(self, name: str) -> tuple[int, str]:
        info = self._stat(name)
        return info.size, info.crc32c

    def replace(self, name: str, data: bytes) -> None:
        self._store.put_bytes(name, data, if_generation=self._generation(name))

    def replace_file(self, name: str, path: Path) -> None:
        """Puts a local file in the place of what is there."""
        self._store.put_file(name, path, if_generation=self._generation(name))

    def _generation(self, name: str) -> int:
        present = self._store.stat(name)
        return present.generation if present else 0


class Run:
    """The shards of one worker, or one of them.

    Attributes:
        metadata: the whole content of its metadata.json; None where there is none, or none that can be used.
        ledger: the shards and notes in it, checked; None likewise.
        damage: why a metadata.json that is there cannot be used, else "".
        shards: names in order; those that metadata.json lists, else those that are there.
        is_part: whether the run is one shard of a worker who may have more.
    """

    metadata: dict[str, Any] | None = None
    ledger: Ledger | None = None

    def __init__(self, files: RunFiles, shards: Sequence[str], *, is_part: bool = False, damage: str = ""):
        self.files = files
        self.shards = list(shards)
        self.is_part = is_part
        self.damage = damage

    @property
    def where(self) -> str:
        return self.files.where

    @property
    def worker_id(self) -> int | None:
        return None

    @property
    def kinds(self) -> list[str]:
        """What is stored of a layer, the main kind first; UNKNOWN_KIND without metadata."""
        return [UNKNOWN_KIND]

    def entry(self, name: str) -> dict[str, Any] | None:
        """What metadata.json says of a shard."""
        return None


class DescribedRun(Run):
    """A run whose metadata.json is there and whole. entries: what it says of each shard, by name."""

    metadata: dict[str, Any]
    ledger: Ledger

    def __init__(self, files: RunFiles, metadata: dict[str, Any], ledger: Ledger, only: str | None):
        """only: the one shard that is looked at; None for all."""
        self.entries = {shard.filename: vars(shard) for shard in ledger.shards}
        super().__init__(files, list(self.entries) if only is None else [only], is_part=only is not None)
        self.metadata = metadata
        self.ledger = ledger

    @property
    def worker_id(self) -> int:
        return self.metadata["worker_id"]

    @property
    def kinds(self) -> list[str]:
        return self.metadata["activation_types"]

    def entry(self, name: str) -> dict[str, Any] | None:
        return self.entries.get(name)


def described(run: Run) -> DescribedRun:
    """The run, which must have a metadata.json and a shard; raises UsageError."""
    if isinstance(run, DescribedRun) and run.shards:
        return run
    raise UsageError(f"{run.where} has no metadata.json or no shard; give the folder of a run")


def read_run(files: RunFiles, only: str | None = None) -> Run:
    """The run of some files, or one shard of it, of which metadata.json says nothing where it is somebody else's."""
    data, damage = files.read(METADATA_NAME), ""
    if data is not None:
        try:
            stored = parse_metadata(data, f"{files.where}/{METADATA_NAME}", described=True)
            if only is None or only in [shard.filename for shard in stored.ledger.shards]:
                return DescribedRun(files, stored.fields, stored.ledger, only)
        except DamagedError as error:
            damage = f"is damaged: {error}"
    if only is not None:
        return Run(files, [only], is_part=True, damage=damage)
    return Run(files, [name for name in files.names() if shard_number(name) is not None], damage=damage)


def open_runs(path: str | Path, *, damaged_too: bool = False) -> list[Run]:
    """The runs at `path`, by worker.

    path: a shard file, a worker's folder, a folder above workers' folders, or the same in a bucket (`gs://...`,
    `file:///...`). damaged_too: give those runs too whose metadata.json cannot be used.

    Raises BadDataError where there are no shards and no metadata.json, and for a metadata.json that cannot be used.
    """
    runs = _runs_in_bucket(str(path)) if is_bucket_url(path) else _local_runs(Path(plain(path)))
    if not runs:
        raise BadDataError(
            f"{path} holds no shards and no metadata.json; give a shard file, a worker's folder, or the folder "
            "above the workers' folders"
        )
    damaged = [run for run in runs if run.damage and not damaged_too]
    if damaged:
        raise BadDataError(f"{damaged[0].where}/{METADATA_NAME} {damaged[0].damage}; {HOW_TO_RESTORE}")
    return runs


def runs_with_layer(runs: Sequence[Run], layer: int | str) -> list[Run]:
    """Those runs that store a layer, or whose metadata does not say; raises UsageError where none does."""
    having = [run for run in runs if run.metadata is None or layer in stored_layers(run)]
    if not having:
        there = dict.fromkeys(each for run in runs for each in stored_layers(run))
        raise UsageError(
            f"layer {layer} is not stored at {runs[0].where}; there are {', '.join(map(str, there))}"
        )
    return having


def refuse_mixed(runs: Sequence[Run], layer: int | str, kind: str | None) -> None:
    """Raises UsageError for runs whose rows of a layer are no one set of rows. kind: None is each run's main one."""

    def about(run: DescribedRun) -> dict[str, str]:
        said = run.metadata
        of_layer = {} if layer == EMBEDDING else {"kind": kind or run.kinds[0]}
        digest = said["model"]["weights_digest"]
        return {**of_layer, "weights_digest": digest, "activation_dtype": said["activation_dtype"]}

    known = [run for run in runs if isinstance(run, DescribedRun)]
    for run in known[1:]:
        first, other = about(known[0]), about(run)
        for what in [each for each in first if first[each] != other[each]]:
            raise UsageError(
                f"{known[0].where} and {run.where} hold rows of another {what}, {first[what]} and {other[what]}; read "
                "them apart" + (", or name a kind that both store" if what == "kind" else "")
            )


def stored_layers(run: Run) -> list[int | str]:
    """The layers of a run, "embedding" last; without metadata those of its first shard."""
    if isinstance(run, DescribedRun):
        with_embedding = run.metadata["fingerprint"]["include_embedding"]
        return [*run.metadata["layers"], *([EMBEDDING] if with_embedding else [])]
    with run.files.local(run.shards[0], layers=()) as path:
        return shard_layers(path)


def is_bucket_url(path: str | Path) -> bool:
    """Whether it is a `gs://` address."""
    return str(path).startswith("gs://")


def local_output(path: str | Path, flag: str, endings: Sequence[str] = ()) -> Path:
    """A folder to write to, or a file with one of the `endings`, .png and the like; raises UsageError for a bucket's
    address, in which nothing here can be written, and for what is something else already."""
    if is_bucket_url(path):
        raise UsageError(
            f"{flag} {path}: this is written on the local disk; give a local path, then copy it with "
            "`gcloud storage cp`"
        )
    output = Path(plain(path))
    if endings and (output.is_dir() or output.suffix not in endings):
        raise UsageError(f"{flag} {path}: give a file that ends in {', '.join(endings)}")
    if endings and not output.absolute().parent.is_dir():
        raise UsageError(f"{flag} {path}: there is no folder {output.parent}; make it, or give another")
    if not endings and output.exists() and not output.is_dir():
        raise UsageError(f"{flag} {path} is a file; give a folder")
    return output


def read_any(path: str | Path) -> bytes:
    """The content of a small local file, or of an object at a gs:// address; raises StorageError."""
    if is_bucket_url(path):
        from qwen_jax.storage.opening import open_store

        above, _, name = str(path).rpartition("/")
        data = BucketFiles(open_store(above)).read(name)
        if data is None:
            raise StorageError(f"{path} is not there")
        return data
    try:
        return read_bounded(Path(plain(path)))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def plain(path: str | Path) -> str:
    """A local path, where it is given as file:///path."""
    return plain_path(str(path))


def _local_runs(path: Path) -> list[Run]:
    if path.is_file():
        return [read_run(LocalFiles(path.parent), path.name)]
    if not path.is_dir():
        raise StorageError(f"{path} is not there; give an existing file, folder or gs:// address")
    return [
        read_run(folder)
        for folder in map(LocalFiles, _folders(path, _FOLDERS_DEEP))
        if _has_run(folder.names())
    ]


def _folders(path: Path, deep: int) -> Iterator[Path]:
    """A folder and those below it, `deep` levels down, by number."""
    yield path
    if deep:
        with os.scandir(path) as entries:
            below = [Path(each) for each in entries if each.is_dir() and not each.name.startswith(".")]
        for folder in sorted(below, key=_by_number):
            yield from _folders(folder, deep - 1)


def _runs_in_bucket(url: str) -> list[Run]:
    from qwen_jax.storage.opening import open_store

    if (shard := bucket_shard(url)) is not None:
        return [read_run(*shard)]
    names: dict[str, list[str]] = {}
    for info in open_store(url).list():
        folder, _, name = info.name.rpartition("/")
        names.setdefault(folder, []).append(name)
    folders = sorted((Path(folder) for folder in names if _has_run(names[folder])), key=_by_number)
    return [
        read_run(BucketFiles(open_store(f"{url.rstrip('/')}/{folder}".removesuffix("/."))))
        for folder in folders
    ]


def bucket_shard(url: str) -> tuple[BucketFiles, str] | None:
    """A shard's files and name, by its address; None where that is no shard's."""
    from qwen_jax.storage.opening import open_store

    above, _, name = url.rpartition("/")
    return None if shard_number(name) is None else (BucketFiles(open_store(above)), name)


def _has_run(names: Iterable[str]) -> bool:
    return any(name == METADATA_NAME or shard_number(name) is not None for name in names)


def _by_number(path: Path) -> tuple[int, str]:
    number = re.search(r"\d+$", path.name)
    return int(number.group()) if number else -1, str(path)
