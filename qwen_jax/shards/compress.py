"""gzip in blocks over all cores, and gzip from strangers within a budget."""

import struct
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType, TracebackType
from typing import BinaryIO, Protocol, Self

from qwen_jax.hardware import this_machines_cores

isal_zlib: ModuleType | None
try:
    from isal import isal_zlib
except ImportError:  # no wheel for this platform; the bytes differ from isal's, the content does not
    isal_zlib = None

BLOCK_BYTES = 1 << 20
"""Most bytes per gzip member, part of the format: the same on every machine, so that shards compare equal."""
IN_PLACE_BYTES = 1 << 18
"""From this size on a piece of data is compressed where it lies, in members of its own; part of the format."""

_BLOCKS_WAITING = 8
_LEVEL = 1
_MEM_LEVEL = 9
_DEFLATE_WBITS, _GZIP_WBITS = -15, 31
_HEAD_BYTES = 16
_INPUT_BYTES = 64 << 10
_OUTPUT_BYTES = 1 << 20
_MOST_MEMBER_BYTES = BLOCK_BYTES + BLOCK_BYTES // 16
"""Most that a member of ours may have: what cannot be compressed grows by a little."""

# A member's header (RFC 1952): no time, no name, and an extra field of our own, "QM", with the size of the whole
# member, so that a reader can jump over it. Behind the deflated data: crc32 and length of the content.
_HEADER = struct.Struct("<10sH2sHI")
_FIXED = b"\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff"
_FIELD = b"QM"
_TRAILER = struct.Struct("<II")
MEMBER_HEAD_BYTES = _HEADER.size

DEFAULT_FLOOR_BYTES = 256 << 20
DEFAULT_RATIO = 64
WORK_FLOOR = 500_000
"""Steps that any file may cost; each of its bytes adds one. A step is about a microsecond: an opcode."""
_MEMBER_WORK = 64


Buffer = bytes | bytearray | memoryview


class Writable(Protocol):
    """What the writer needs of a file."""

    def write(self, data: Buffer, /) -> int | None: ...


def isal_version() -> str | None:
    """None where zlib takes its place, which gives other bytes."""
    return None if isal_zlib is None else version("isal")


def compress_block(block: Buffer) -> bytes:
    """Returns `block` as one gzip member that says how long it is, without time or file name."""
    block = memoryview(block)
    deflated = _deflate(block)
    header = member_head(sum(map(len, deflated)) + _TRAILER.size)
    return b"".join([header, *deflated, _TRAILER.pack(crc32(block), len(block))])


def member_head(behind: int, extra: int = 0) -> bytes:
    """The MEMBER_HEAD_BYTES that a member begins with. behind: how many of its bytes follow; extra: how many of these
    belong to the header's extra field."""
    return _HEADER.pack(_FIXED, 8 + extra, _FIELD, 4, MEMBER_HEAD_BYTES + behind)


def crc32(data: Buffer, before: int = 0) -> int:
    """The crc32 of `data`, or of what has the crc32 `before` and then `data`."""
    return (isal_zlib or zlib).crc32(data, before)


def _deflate(block: memoryview) -> list[bytes]:
    """In pieces, since to join them once more would cost a tenth of the speed."""
    if isal_zlib is None:
        deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, _DEFLATE_WBITS)
        return [deflate.compress(block), deflate.flush()]
    # At level 1 ISA-L (2.32 and before) hashes an address on its stack in place of the third byte of a
    # stream (igzip_icf_body_h1_gr_bt.asm, .write_first_byte), so about one small block in a thousand
    # compresses differently from one thread or process to the next. A stream that begins with at most 16
    # bytes and a flush takes another way through its code, and costs about ten bytes.
    deflate = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, _DEFLATE_WBITS, _MEM_LEVEL)
    head = [deflate.compress(block[:_HEAD_BYTES]), deflate.flush(isal_zlib.Z_SYNC_FLUSH)]
    return [*head, deflate.compress(block[_HEAD_BYTES:]), deflate.flush()]


@dataclass
class Span:
    """Members that belong together: their bytes, and the crc32 of these."""

    size: int = 0
    crc32: int = 0

    def add(self, member: bytes) -> None:
        self.size += len(member)
        self.crc32 = crc32(member, self.crc32)


class ParallelGzipWriter:
    """A file-like that writes gzip, a member per block of at most BLOCK_BYTES, compressed on a thread pool.

    Small writes are gathered into blocks. A write of IN_PLACE_BYTES or more is cut into blocks of its own
    and never copied, as a copy costs a tenth of the speed: its buffer must not change before `close`. The
    output depends on the writes and cuts alone, never on `threads`. Memory: at most `threads + 10` blocks. Leave the
    `with` block by an exception and nothing more is written: the file then ends early and is never
    mistaken for a whole shard.

    Args:
        file: where the members go, in order; it is not closed.
        threads: compressing threads; None takes every core this process may use.

    Attributes:
        spans: the members between cuts, known once it is closed.
    """

    def __init__(self, file: Writable, threads: int | None = None):
        self.spans = [Span()]
        self._file = file
        self._threads = threads or len(this_machines_cores())
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="gzip")
        self._pending: deque[tuple[Span, Future[bytes]]] = deque()
        self._block = bytearray()
        self._submitted = False
        self._failure: BaseException | None = None
        self._closed = False

    def write(self, data: Buffer) -> int:
        """Takes bytes; raises here whatever an earlier block or the file met with."""
        return self.write_joined([data])

    def write_joined(self, pieces: Sequence[Buffer]) -> int:
        """Takes bytes that lie in several pieces: the output is that of their concatenation, which is not made."""
        self._check_open()
        views = [memoryview(piece).cast("B") for piece in pieces]
        size = sum(map(len, views))
        if size >= IN_PLACE_BYTES:
            self._compress_in_place(views)
        else:
            for view in views:
                self._gather(view)
        return size

    def cut(self) -> None:
        """What is written from now on comes into members of its own, and is counted in a span of its own."""
        self._check_open()
        if self._block:
            self._submit_gathered()
        self.spans.append(Span())

    def close(self) -> None:
        """Writes what is left; a second call does nothing, a call after a failure raises it again."""
        if self._failure is not None:
            raise self._failure
        if self._closed:
            return
        if self._block or not self._submitted:
            self._submit_gathered()
        self._drain(0)
        self._stop()

    def abort(self) -> None:
        """Throws away what has not been written and ends the threads."""
        if not self._closed:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ):
        if kind is None:
            self.close()
        else:
            self.abort()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise ValueError("write to a closed ParallelGzipWriter")

    def _compress_in_place(self, views: Sequence[memoryview]) -> None:
        if self._block:
            self._submit_gathered()
        for block in _blocks(views):
            self._submit(block)

    def _gather(self, view: memoryview) -> None:
        while len(view):
            piece = view[: BLOCK_BYTES - len(self._block)]
            self._block += piece
            view = view[len(piece) :]
            if len(self._block) == BLOCK_BYTES:
                self._submit_gathered()

    def _submit_gathered(self) -> None:
        self._submit(self._block)
        self._block = bytearray()

    def _submit(self, block: Buffer) -> None:
        self._pending.append((self.spans[-1], self._pool.submit(compress_block, block)))
        self._submitted = True
        # Enough in flight to keep the pool busy while this thread waits for the file.
        self._drain(self._threads + _BLOCKS_WAITING)

    def _drain(self, keep: int) -> None:
        """Writes finished members, oldest first, until at most `keep` blocks are in flight."""
        try:
            while len(self._pending) > keep:
                span, compressed = self._pending.popleft()
                member = compressed.result()
                self._file.write(member)
                span.add(member)
        except BaseException as error:
            # Kept for the next call: a caller that swallows this one must not get a file with a hole.
            self._failure = error
            self._stop()
            raise

    def _stop(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._closed = True
        self._pending.clear()
        self._block = bytearray()


def _blocks(views: Sequence[memoryview]) -> Iterator[Buffer]:
    """Cuts what the views hold together every BLOCK_BYTES; only a block that lies in two of them is copied."""
    begun: list[memoryview] = []
    missing = BLOCK_BYTES
    for view in views:
        for start in range(-(BLOCK_BYTES - missing), len(view), BLOCK_BYTES):
            piece = view[max(start, 0) : start + BLOCK_BYTES]
            begun.append(piece)
            missing -= len(piece)
            if not missing:
                yield _one(begun)
                begun, missing = [], BLOCK_BYTES
    if begun:
        yield _one(begun)


def _one(pieces: Sequence[memoryview]) -> Buffer:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class MalformedError(ValueError):
    """The bytes are not what they claim to be; load_shard makes it a ShardError with the file's name."""


class Budget:
    """What reading may cost in bytes of memory and steps of work, so that a small file cannot ask for all of it.

    Without `max_bytes` the limit grows with the compressed bytes of the input: DEFAULT_FLOOR_BYTES + DEFAULT_RATIO
    per byte (hidden states compress about 2 to 1). Work: see WORK_FLOOR.

    size: of the whole input, which counts from the start: what samples share comes first, and of samples of one row it
    takes nearly all of the work and few of the bytes. None where it is not known: then what is read counts.
    """

    def __init__(self, max_bytes: int | None = None, size: int | None = None):
        self._ratio = DEFAULT_RATIO if max_bytes is None else 0
        self.limit = DEFAULT_FLOOR_BYTES if max_bytes is None else max_bytes
        self.used = 0
        self.work_left = WORK_FLOOR
        self._counts_reads = size is None
        self._raise(size or 0)

    def earn(self, compressed: int) -> None:
        """Raises the limits for `compressed` bytes that were read, unless all count already."""
        if self._counts_reads:
            self._raise(compressed)

    def _raise(self, compressed: int) -> None:
        self.work_left += compressed
        self.limit += self._ratio * compressed

    def work(self, steps: int) -> None:
        """Takes steps off; raises MalformedError when they are not there. A shard has far fewer than bytes."""
        self.work_left -= steps
        if self.work_left < 0:
            raise MalformedError("takes more work to read than a file of its size does")

    def charge(self, cost: int) -> None:
        """Takes `cost` bytes off; raises MalformedError when they are not there."""
        self.used += cost
        if self.used > self.limit:
            raise MalformedError(
                f"unpacks to more than {self.limit:,} bytes, too much for "
                f"{'its size' if self._ratio else 'max_bytes'} (pass a larger max_bytes if you trust it)"
            )


class GzipReader:
    """The content of a gzip file of any number of members, read forwards.

    Every output byte is charged to `budget`, but for those that `skip` jumps over. Bad magic, a wrong CRC, a cut and
    bytes after the last member raise MalformedError. isal inflates whole members of our own form; zlib whatever else
    there is, and what isal does not find right.
    """

    def __init__(self, file: BinaryIO, budget: Budget):
        self._file = file
        self._can_seek = file.seekable()
        self._budget = budget
        self._input = b""
        self._output = b""
        self._at = 0
        self._inflate = zlib.decompressobj(_GZIP_WBITS)
        self._in_member = True

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end only."""
        piece = self._taken(size)
        if len(piece) == size:
            return piece
        pieces, missing = [piece], size - len(piece)
        while missing and self._fill():
            pieces.append(self._taken(missing))
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def read_into(self, target: memoryview) -> int:
        """Fills `target` with the next bytes; returns how many those are, fewer at the end only."""
        filled = 0
        while filled < len(target) and (self._at < len(self._output) or self._fill()):
            piece = memoryview(self._output)[self._at : self._at + len(target) - filled]
            target[filled : filled + len(piece)] = piece
            self._at += len(piece)
            filled += len(piece)
        return filled

    def readline(self, limit: int) -> bytes:
        """Up to the next newline, with it, and at most `limit` bytes."""
        line = b""
        while len(line) < limit and not line.endswith(b"\n"):
            byte = self.read(1)
            if not byte:
                break
            line += byte
        return line

    def skip(self, size: int) -> None:
        """Goes on `size` bytes; of members that lie in them whole, and say how long they are, nothing is read."""
        size -= len(self._taken(size))
        while size:
            jumped = self._jump(size)
            if not jumped and not self._fill():
                raise MalformedError("ends in the middle of its gzip data")
            size -= jumped or len(self._taken(size))

    def _taken(self, size: int) -> bytes:
        """At most `size` bytes of those that are inflated already."""
        piece = self._output[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def _jump(self, most: int) -> int:
        """Passes the next member if its content is at most `most` bytes; returns how many those are, 0 for none."""
        if self._in_member or not self._can_seek:
            return 0
        size = self._member_size()
        if not size:
            return 0
        behind = size - len(self._input)
        if behind <= 0:
            end = self._input[size - 4 : size]
        else:
            start = self._file.tell()
            self._file.seek(start + behind - 4)
            # Of the four bytes some may be in the input already; read from the file they are the same ones.
            end = self._file.read(4)
        if len(end) < 4:
            raise MalformedError("ends in the middle of its gzip data")
        content = int.from_bytes(end, "little")
        if content > most:
            if behind > 0:
                self._file.seek(start)
            return 0
        self._budget.work(_MEMBER_WORK)
        self._input = self._input[size:]
        return content

    def _member_size(self) -> int:
        """The size that the next member's header gives, 0 where it gives none."""
        if len(self._input) < _HEADER.size:
            self._read_on()
        if len(self._input) < _HEADER.size:
            return 0
        fixed, extra, field, length, size = _HEADER.unpack_from(self._input)
        if (fixed, extra, field, length) != (_FIXED, 8, _FIELD, 4):
            return 0
        return size if size >= _HEADER.size + _TRAILER.size else 0

    def _fill(self) -> bool:
        """Inflates the next bytes; False at the end."""
        while True:
            if not self._input and not self._refill():
                return False
            if self._in_member:
                data = self._step()
            else:
                self._budget.work(_MEMBER_WORK)
                own = self._own_member()
                data = self._begin() if own is None else own
            if data:
                self._budget.charge(len(data))
                self._output, self._at = data, 0
                return True

    def _own_member(self) -> bytes | None:
        """The next member's content, if it is a whole one as compress_block makes them, which is passed then."""
        size = self._member_size()
        if isal_zlib is None or not 0 < size <= _MOST_MEMBER_BYTES:
            return None
        if size > len(self._input):
            self._read_on(size - len(self._input))
        member = memoryview(self._input)[:size]
        wanted = _TRAILER.unpack(member[-_TRAILER.size :])
        # A byte more than there may be: else the end of the data is not looked at.
        most = min(wanted[1], BLOCK_BYTES) + 1
        inflate = isal_zlib.decompressobj(_DEFLATE_WBITS)
        try:
            content = inflate.decompress(member[_HEADER.size : -_TRAILER.size], most)
        except isal_zlib.error:
            return None
        if not inflate.eof or inflate.unused_data or wanted != (crc32(content), len(content)):
            return None
        self._input = self._input[size:]
        return content

    def _begin(self) -> bytes:
        """The first bytes of the next member, by zlib."""
        self._inflate, self._in_member = zlib.decompressobj(_GZIP_WBITS), True
        return self._step()

    def _read_on(self, size: int = _INPUT_BYTES) -> None:
        data = self._file.read(size)
        self._budget.earn(len(data))
        self._input += data

    def _refill(self) -> bool:
        self._read_on()
        if self._input:
            return True
        if self._in_member:
            raise MalformedError("ends in the middle of its gzip data")
        return False

    def _step(self) -> bytes:
        try:
            data = self._inflate.decompress(self._input, _OUTPUT_BYTES)
        except zlib.error as error:
            raise MalformedError(f"holds bad gzip data ({error})") from error
        self._in_member = not self._inflate.eof
        self._input = self._inflate.unconsumed_tail if self._in_member else self._inflate.unused_data
        return data
