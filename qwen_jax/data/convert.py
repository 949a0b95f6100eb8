"""Rows of a source dataset -> stream lines, on all cores, in order."""

import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

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
    Raises StorageError where the source itself cannot be read on.
    """
    try:
        convert = partial(_convert_chunk, column_name=column_name, spread=spread)
        for converted in chain.from_iterable(_converted_chunks(iter(rows), convert)):
            if isinstance(converted, Rejected):
                reject(converted)
            else:
                taken_for(converted.kind)
                yield from converted.lines
    except BrokenProcessPool as error:
        raise StorageError(
            "a process that converts rows was killed (is the machine out of memory?); start again"
        ) from error
    except OSError as error:
        raise StorageError(
            f"the dataset cannot be read: {error}; check --dataset_name and its permissions"
        ) from error


_Chunk = list[Converted | Rejected]


def _converted_chunks(rows: Iterator[Row], convert: Callable[[list[Row]], _Chunk]) -> Iterator[_Chunk]:
    chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    # A small dataset is done before processes have started; so is the first chunk of a large one.
    yield convert(next(chunks, []))
    second, cores = next(chunks, None), len(this_machines_cores())
    if second is None:
        return
    if cores == 1:
        yield from map(convert, chain([second], chunks))
        return
    with ProcessPoolExecutor(cores, multiprocessing.get_context("forkserver")) as pool:
        under_way: deque[Future[_Chunk]] = deque()
        for chunk in chain([second], chunks):
            under_way.append(pool.submit(convert, chunk))
            if len(under_way) > 2 * cores:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


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
