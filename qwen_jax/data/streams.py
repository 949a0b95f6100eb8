"""Streams: JSONL files of one record a line. Made once from a dataset, then read by one worker each."""

import contextlib
import hashlib
import io
import json
import os
import resource
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from qwen_jax.data.arc import BadRecord, Row, Task, Text, parse_line
from qwen_jax.data.convert import Rejected, stream_lines
from qwen_jax.data.dialogues import ALPACA, SHAREGPT
from qwen_jax.data.spread import Spread
from qwen_jax.errors import BadDataError, ConfigError, UsageError
from qwen_jax.files import storage_errors

MAX_LINE_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
MANIFEST_NAME = "streams.json"
_REJECTED_LISTED = 1000


def stream_name(index: int) -> str:
    """The file name of a worker's stream."""
    return f"stream_{index:03d}.jsonl"


def read_stream(
    path: str | Path, start: int = 0, expected: "StreamSummary | None" = None
) -> Iterator[tuple[int, Task | Text | BadRecord]]:
    """Yields (sample_idx, record) from line `start` on; a bad line yields its BadRecord in place.

    sample_idx is the 0-based line number, so that bad lines never shift the others. Lines longer than
    MAX_LINE_BYTES are bad records, read past in pieces.

    Raises ConfigError if the file is not there, and, where `expected` is given, before any line is yielded that is not
    what was summed up then.
    """
    with _open_stream(path) as whole:
        file = whole if expected is None else io.BufferedReader(_Unchanged(whole, path, expected))
        for sample_idx, raw in enumerate(read_lines(file)):
            if sample_idx >= start:
                yield sample_idx, _parse(raw)


def _open_stream(path: str | Path) -> BinaryIO:
    advice = "make it with create_dataset_streams.py, or pass --dataset_path"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device has no end, or one that comes once
            raise ConfigError(f"the stream {path} is not a file; {advice}")
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the stream {path}: {reason}; {advice}") from error


def read_lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Lines without bound on their number; None stands for one that is too long to hold."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield line
        else:
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK_BYTES)
            yield None


def _parse(raw: bytes | None) -> Task | Text | BadRecord:
    if raw is None:
        return BadRecord(f"line longer than {MAX_LINE_BYTES} bytes")
    try:
        return parse_line(raw)
    except BadRecord as bad:
        return bad


@dataclass(frozen=True)
class StreamSummary:
    """sha256 of a stream file's bytes (hex), and its number of lines.

    marks: the sha256 of all bytes up to the end of each piece of 1 MiB, by which a change is seen where it begins.
    """

    sha256: str
    lines: int
    marks: tuple[bytes, ...] = field(default=(), repr=False, compare=False)


def stream_summary(path: str | Path) -> StreamSummary:
    """Reads a stream file once, in bounded memory; raises ConfigError if it is not there."""
    digest = hashlib.sha256()
    newlines, last, marks = 0, b"\n", []
    with _open_stream(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            marks.append(digest.digest())
            newlines += chunk.count(b"\n")
            last = chunk[-1:]
    return StreamSummary(digest.hexdigest(), newlines + (last != b"\n"), tuple(marks))


class _Unchanged(io.RawIOBase):
    """A stream file's bytes, piece by piece, each only once it is known to be what was summed up."""

    def __init__(self, file: BinaryIO, path: str | Path, expected: StreamSummary):
        self._file, self._path = file, path
        self._marks = iter(expected.marks)
        self._digest = hashlib.sha256()
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._piece:
            self._piece = memoryview(self._next_piece())
        length = min(len(buffer), len(self._piece))
        buffer[:length] = self._piece[:length]
        self._piece = self._piece[length:]
        return length

    def _next_piece(self) -> bytes:
        piece = self._file.read(_CHUNK_BYTES)
        self._digest.update(piece)
        if (self._digest.digest() if piece else None) != next(self._marks, None):
            raise ConfigError(
                f"the stream {self._path} was changed while it was in use, so nothing more of it is stored; put back "
                "the file as it was and start again, or pass --force_restart to extract the changed one from its start"
            )
        return piece


class StreamFile:
    """A stream file being written: under a temporary name until it is whole.

    Whatever the disk refuses is raised as StorageError.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = 0
        self._digest = hashlib.sha256()
        self._temp = path.with_name(path.name + ".tmp")
        with storage_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: io.BufferedWriter = open(self._temp, "wb")  # noqa: SIM115  (finish or discard closes it)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, line: bytes) -> None:
        with storage_errors("write", self.path):
            self._file.write(line)
        self._digest.update(line)
        self.lines += 1

    def finish(self) -> None:
        """Makes the bytes durable, still under the temporary name."""
        with storage_errors("write", self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def publish(self) -> None:
        """Gives the finished file its name."""
        with storage_errors("write", self.path):
            os.replace(self._temp, self.path)

    def discard(self) -> None:
        """Removes what is not published; used while another error is on its way."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temp.unlink()


@contextlib.contextmanager
def stream_files(paths: list[Path]) -> Iterator[list[StreamFile]]:
    """Files that all get their names when the `with` block ends well, and none of them otherwise."""
    files: list[StreamFile] = []
    try:
        for path in paths:
            files.append(StreamFile(path))
        yield files
        for file in files:
            file.finish()
        for file in files:
            file.publish()
    finally:
        for file in files:
            file.discard()


@dataclass(frozen=True)
class StreamsReport:
    """What write_streams did. samples: lines. rejected: rows that got no line, at most the first 1000 with their
    reasons. taken_for: usable rows by what they were taken for."""

    samples: int
    rejected: int
    listed: list[Rejected]
    taken_for: dict[str, int]


def write_streams(
    rows: Iterable[Row],
    num_streams: int,
    output_dir: Path,
    *,
    column_name: str = "examples",
    source: dict[str, Any] | None = None,
    spread: Spread = Spread(),  # noqa: B008  (it is frozen)
) -> StreamsReport:
    """Deals lines round-robin to `num_streams` files, then writes streams.json; the same rows, the same bytes.

    source: what streams.json says about the origin (name, revision, split). spread: which lines a row gives.
    Raises UsageError if the folder holds further streams of an earlier run, BadDataError if no row is usable.
    """
    _refuse_further_streams(output_dir, num_streams)
    _allow_open_files(num_streams)
    rejected = 0
    listed: list[Rejected] = []
    kinds: Counter[str] = Counter()

    def reject(row: Rejected) -> None:
        nonlocal rejected
        rejected += 1
        if len(listed) < _REJECTED_LISTED:
            listed.append(row)

    with stream_files([output_dir / stream_name(i) for i in range(num_streams)]) as files:
        samples = 0
        for line in stream_lines(rows, column_name, reject, spread, lambda kind: kinds.update([kind])):
            files[samples % num_streams].write(line)
            samples += 1
        if not samples:
            reasons = "; ".join(f"row {row.row}: {row.reason}" for row in listed[:3]) or "it is empty"
            raise BadDataError(
                f"no usable row in the dataset ({reasons}); check --dataset_name and --column_name"
            )
    report = StreamsReport(samples, rejected, listed, dict(sorted(kinds.items())))
    _write_manifest(output_dir, files, column_name, source or {}, report)
    return report


def _write_manifest(
    output_dir: Path, files: list[StreamFile], column_name: str, source: dict[str, Any], report: StreamsReport
) -> None:
    manifest = {
        "source": source | {"column_name": column_name},
        "num_streams": len(files),
        "samples": report.samples,
        "rejected": report.rejected,
        **({"taken_for": report.taken_for} if report.taken_for.keys() & {SHAREGPT, ALPACA} else {}),
        "streams": [{"file": f.path.name, "samples": f.lines, "sha256": f.sha256} for f in files],
        "rejected_rows": [asdict(row) for row in report.listed],
    }
    with stream_files([output_dir / MANIFEST_NAME]) as (file,):
        file.write((json.dumps(manifest, indent=2) + "\n").encode())


def _refuse_further_streams(output_dir: Path, num_streams: int) -> None:
    wanted = {stream_name(i) for i in range(num_streams)}
    further = sorted(path.name for path in output_dir.glob("stream_*.jsonl") if path.name not in wanted)
    if further:
        raise UsageError(
            f"--output_dir {output_dir} holds {len(further)} more streams from another run ({further[0]} ...), "
            "which workers would mix up with these; remove them or choose another folder"
        )


def _allow_open_files(num_streams: int) -> None:
    needed = num_streams + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UsageError(
                f"--num_streams {num_streams} needs {needed} open files, the system allows {hard}; "
                "raise `ulimit -n` or use fewer streams"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
