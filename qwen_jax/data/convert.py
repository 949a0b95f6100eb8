"""Rows of a source dataset -> stream lines, on all cores, in order."""

import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any, Self, cast

from qwen_jax.data.arc import BadRecord, Row, parse_row_line, record_from_row
from qwen_jax.data.spread import Spread
from qwen_jax.errors import StorageError
from qwen_jax.hardware import this_machines_cores

CHUNK_ROWS = 128


@dataclass(frozen=True)
class Rejected:
    """A source row that gets no line."""

    row: int
    reason: str


@dataclass(frozen=True)
class Converted:
    """A source row's lines. kind: what it was taken for (arc.record_from_row)."""

    kind: str
    lines: list[bytes]


def stream_lines(
    rows: Iterable[Row],
    column_name: str,
    reject: Callable[[Rejected], None],
    spread: Spread = Spread(),  # noqa: B008  (it is frozen)
    taken_for: Callable[[str], None] = lambda kind: None,
) -> Iterator[bytes]:
    """Source rows as stream lines; those that cannot be used go to `reject`. The order is that of `rows`.

    spread: which lines a row gives. taken_for: is told of each usable row what it was taken for.

    A few chunks of rows are under way at a time, so memory does not grow with their number.
    Raises StorageError where the source itself cannot be read on, or a process that converts dies.
    """
    try:
        convert = partial(_convert_chunk, column_name=column_name, spread=spread)
        for converted in chain.from_iterable(_converted_chunks(iter(rows), convert)):
            if isinstance(converted, Rejected):
                reject(converted)
            else:
                taken_for(converted.kind)
                yield from converted.lines
    except OSError as error:
        raise StorageError(
            f"the dataset cannot be read: {error}; check --dataset_name and its permissions"
        ) from error


_Chunk = list[Converted | Rejected]
_Convert = Callable[[list[Row]], _Chunk]


def _converted_chunks(rows: Iterator[Row], convert: _Convert) -> Iterator[_Chunk]:
    chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    # A small dataset is done before processes have started; so is the first chunk of a large one.
    yield convert(next(chunks, []))
    second, cores = next(chunks, None), len(this_machines_cores())
    if second is None:
        return
    if cores == 1:
        yield from map(convert, chain([second], chunks))
        return
    yield from _on_cores(cores, convert, chain([second], chunks))


def _on_cores(cores: int, convert: _Convert, chunks: Iterator[list[Row]]) -> Iterator[_Chunk]:
    with ExitStack() as running:
        idle = deque(running.enter_context(_Process(convert)) for _ in range(cores))
        busy: deque[_Process] = deque()
        for chunk in chunks:
            if idle:
                process, converted = idle.popleft(), []
            else:
                process = busy.popleft()
                converted = [process.result()]
            process.start(chunk)
            busy.append(process)
            yield from converted
        for process in busy:
            yield process.result()


class _Process:
    """A process that converts one chunk at a time. It has a pipe of its own: of one that several share, as
    concurrent.futures has it, nobody learns that a process died in the middle of sending."""

    def __init__(self, convert: _Convert) -> None:
        context = multiprocessing.get_context("forkserver")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, convert), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def start(self, chunk: list[Row]) -> None:
        with self._alive():
            self._connection.send(chunk)

    def result(self) -> _Chunk:
        with self._alive():
            return cast(_Chunk, self._connection.recv())

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode
            if code == 1:  # as Python ends by an exception
                raise RuntimeError("a process that converts rows failed; its error stands above") from error
            raise StorageError(
                f"a process that converts rows died (exit code {code}; is the machine out of memory?); start again"
            ) from error


def _serve(connection: Connection, convert: _Convert) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks.
    with suppress(EOFError, ConnectionError):
        while True:
            connection.send(convert(connection.recv()))


def _convert_chunk(chunk: list[Row], column_name: str, spread: Spread) -> _Chunk:
    return [_convert_row(index, row, column_name, spread) for index, row in chunk]


def _convert_row(
    index: int, row: dict[str, Any] | bytes | BadRecord, column_name: str, spread: Spread
) -> Converted | Rejected:
    try:
        if isinstance(row, BadRecord):
            raise row
        if isinstance(row, bytes):
            row = parse_row_line(row)
        kind, record = record_from_row(row, column_name, f"row-{index}")
        return Converted(kind, [encode_line(line) for line in spread.lines(record, index)])
    except BadRecord as bad:
        return Rejected(index, str(bad))


def encode_line(record: dict[str, Any]) -> bytes:
    """One record as a stream line: compact JSON, UTF-8, newline."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
