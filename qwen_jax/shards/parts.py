"""Where each layer of a shard lies: said by an empty gzip member at its end, which gzip and pickle pass over."""

import os
import struct
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import BinaryIO, NamedTuple

from qwen_jax.kinds import EMBEDDING
from qwen_jax.shards.compress import MEMBER_HEAD_BYTES, Buffer, MalformedError, Span, crc32, member_head

TAIL_BYTES = 16 << 10
"""Of a shard's end: enough to hold any index."""
HEAD = "head"
"""The part before the layers: what all of them share."""

# The member's extra field is two: "QM" as in every member, and "QL" with an entry a part, then the member's size, the
# crc32 of all before it, and a mark, by which the index is found from the end. Behind that, no content.
_FIELD = struct.Struct("<2sH")
_ENTRY = struct.Struct("<iIQ")
_CHECK = struct.Struct("<II4s")
_NAME, _MARK = b"QL", b"QIDX"
_NO_CONTENT = b"\x03\x00" + bytes(8)
_CODES = {HEAD: -1, EMBEDDING: -2}
_KEYS = {code: key for key, code in _CODES.items()}


class Part(NamedTuple):
    """A run of whole gzip members: HEAD, a layer or EMBEDDING; where it starts in the file, its bytes, their crc32."""

    key: int | str
    start: int
    size: int
    crc32: int

    @property
    def end(self) -> int:
        return self.start + self.size


def index_member(keys: Iterable[int | str], spans: Iterable[Span]) -> bytes:
    """The index of the parts that these spans are, in order; nothing where there are more than an index can hold."""
    entries = b"".join(
        _ENTRY.pack(key if isinstance(key, int) else _CODES[key], span.crc32, span.size)
        for key, span in zip(keys, spans, strict=True)
    )
    field = _FIELD.size + len(entries) + _CHECK.size
    size = MEMBER_HEAD_BYTES + field + len(_NO_CONTENT)
    if size > TAIL_BYTES:
        return b""
    head = member_head(field + len(_NO_CONTENT), field)
    said = head + _FIELD.pack(_NAME, len(entries) + _CHECK.size) + entries
    return said + _CHECK.pack(size, crc32(said), _MARK) + _NO_CONTENT


def parse_index(tail: Buffer, size: int) -> list[Part]:
    """The parts of a shard of `size` bytes whose last TAIL_BYTES (or all) are `tail`; none where it has no index.

    Raises MalformedError for an index that is not whole, or is another file's.
    """
    at = len(tail) - len(_NO_CONTENT) - _CHECK.size
    if at < 0 or tail[at + _CHECK.size :] != _NO_CONTENT:
        return []
    length, said_crc32, mark = _CHECK.unpack_from(tail, at)
    if mark != _MARK:
        return []
    start = len(tail) - length
    said = bytes(tail[max(start, 0) : at])
    entries = said[MEMBER_HEAD_BYTES + _FIELD.size :]
    if start < 0 or crc32(said) != said_crc32 or len(entries) % _ENTRY.size:
        raise MalformedError("has a damaged index of its layers")
    return _parts(entries, size - length)


def _parts(entries: bytes, end: int) -> list[Part]:
    parts: list[Part] = []
    for code, said_crc32, size in _ENTRY.iter_unpack(entries):
        parts.append(Part(_KEYS.get(code, code), parts[-1].end if parts else 0, size, said_crc32))
    keys = [part.key for part in parts]
    if not parts or keys[0] != HEAD or len(set(keys)) < len(keys) or parts[-1].end != end:
        raise MalformedError("has an index of other layers than it holds")
    return parts


def bytes_left(file: BinaryIO) -> int:
    """From where a file that can seek is to its end."""
    start = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(start)
    return end - start


def read_index(file: BinaryIO) -> list[Part]:
    """As parse_index, of a file that can seek, which is left where it was."""
    start, size = file.tell(), bytes_left(file)
    file.seek(start + max(0, size - TAIL_BYTES))
    tail = file.read(TAIL_BYTES)
    file.seek(start)
    return [part._replace(start=start + part.start) for part in parse_index(tail, size)]


def stored_keys(parts: Sequence[Part]) -> list[int | str]:
    """The layers, EMBEDDING last, of which the shard has a part."""
    return [part.key for part in parts if part.key != HEAD]


def wanted_parts(parts: Sequence[Part], layers: Collection[int | str]) -> list[Part]:
    """What reading these layers takes, in the file's order: nothing for none."""
    return [part for part in parts if layers and (part.key == HEAD or part.key in layers)]


def ranges(parts: Sequence[Part], most: int) -> list[tuple[int, int]]:
    """Start and end of at most `most` pieces of the file that hold all of `parts`; of what lies between these the
    smallest gaps are taken along."""
    if not parts:
        return []
    gaps = [after.start - before.end for before, after in pairwise(parts)]
    widest = sorted(range(len(gaps)), key=gaps.__getitem__, reverse=True)[: most - 1]
    cuts = sorted(at + 1 for at in widest if gaps[at])
    return [(parts[a].start, parts[b - 1].end) for a, b in pairwise([0, *cuts, len(parts)])]


class PartReader:
    """Some parts of a file, one behind the other, as a file that goes forwards. A part whose bytes are not those that
    the index says raises MalformedError before its last ones are given out. size: bytes of all parts."""

    def __init__(self, file: BinaryIO, parts: Sequence[Part]):
        self.size = sum(part.size for part in parts)
        self._file = file
        self._parts = iter(parts)
        self._part = Part(HEAD, 0, 0, 0)
        self._left = 0
        self._crc32 = 0

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        """At most `size` bytes, of one part."""
        if not self._left and not self._begin():
            return b""
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        self._crc32 = crc32(data, self._crc32)
        if not data or (not self._left and self._crc32 != self._part.crc32):
            raise MalformedError(
                f"has a damaged part, {self._part.key}: its checksum is not that of the index"
            )
        return data

    def finish(self) -> None:
        """Reads, and so checks, what is left."""
        while self.read(TAIL_BYTES):
            pass

    def _begin(self) -> bool:
        part = next(self._parts, None)
        if part is None:
            return False
        self._part, self._left, self._crc32 = part, part.size, 0
        self._file.seek(part.start)
        return True
