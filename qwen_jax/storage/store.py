"""What a store of shards and checkpoints does, be it a bucket or a folder that stands in for one."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from qwen_jax.errors import BadDataError, StorageError, WriterConflictError
from qwen_jax.ledger.checks import MOST_BYTES


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object.

    Attributes:
        name: relative to the store's prefix.
        size: bytes.
        crc32c: base64, as GCS shows it.
        generation: changes whenever the object is replaced; never 0.
        writer: the token that its writer gave, if any.
    """

    name: str
    size: int
    crc32c: str
    generation: int
    writer: str | None = None


class PreconditionFailedError(WriterConflictError):
    """The object is not of the generation that the caller expects: somebody else wrote it.

    `present` is what is there now, None if nothing is.
    """

    def __init__(self, message: str, present: ObjectInfo | None):
        super().__init__(message)
        self.present = present


class ReplacedError(StorageError):
    """The object that was being read is no longer there; another may stand in its place."""


class Store(Protocol):
    """What both backends do.

    `if_generation` of a write or delete: None for whatever is there, 0 for nothing, n for that generation.
    A write whose condition fails still succeeds, with the object present as the result, when that object
    has the same size and crc32c, and the same `writer` where one is given: then an earlier try
    of ours got through and its reply was lost.

    All methods raise StorageError when the store cannot be reached or refuses, TerminatedError when
    the stop event is set while they wait.
    """

    url: str

    def put_bytes(
        self, name: str, data: bytes, if_generation: int | None = None, *, writer: str | None = None
    ) -> ObjectInfo:
        """Writes an object; raises PreconditionFailedError."""
        ...

    def put_file(
        self,
        name: str,
        path: str | os.PathLike,
        if_generation: int | None = None,
        *,
        writer: str | None = None,
    ) -> ObjectInfo:
        """Writes an object from a local file, in bounded memory; raises PreconditionFailedError."""
        ...

    def get_bytes(self, name: str) -> tuple[bytes, ObjectInfo] | None:
        """Content and description of one and the same generation; None if there is no such object.

        Raises BadDataError for one that is too large to be held.
        """
        ...

    def download_file(self, name: str, path: str | os.PathLike) -> ObjectInfo | None:
        """Writes an object to a local file, atomically, its crc32c checked; None if there is none."""
        ...

    def stat(self, name: str) -> ObjectInfo | None:
        """Describes an object; None if there is none."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose names start with `prefix`, by name."""
        ...

    def delete(self, name: str, if_generation: int | None = None) -> None:
        """Removes an object; one that is gone already is no error. Raises PreconditionFailedError."""
        ...


def check_small(info: ObjectInfo, where: str) -> None:
    """Raises BadDataError for an object that is too large to be read at once."""
    if info.size > MOST_BYTES:
        raise BadDataError(
            f"{where}/{info.name} has {info.size:,} bytes, which no file of its kind has; delete it, or restore it"
        )


def accept_or_conflict(
    wanted: ObjectInfo, if_generation: int | None, present: ObjectInfo | None, where: str
) -> ObjectInfo:
    """Settles a failed precondition of a write: our own earlier try is a success, anything else is not.

    `wanted` describes the bytes to be written; its generation is not looked at.
    """
    if (
        present is not None
        and wanted.writer in (None, present.writer)
        and (present.size, present.crc32c) == (wanted.size, wanted.crc32c)
    ):
        return present
    raise conflict(wanted.name, if_generation, present, where)


def conflict(
    name: str, if_generation: int | None, present: ObjectInfo | None, where: str
) -> PreconditionFailedError:
    """The error for an object that is not as expected."""
    expected = f"generation {if_generation}" if if_generation else "no object"
    found = f"generation {present.generation}, {present.size} bytes" if present else "no object"
    return PreconditionFailedError(
        f"{where}/{name}: expected {expected}, found {found}. Another writer has been here; make sure that "
        f"only one worker uses this id, then start again",
        present,
    )
