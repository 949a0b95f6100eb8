"""Rows of a source dataset -> stream lines, on all cores, in order."""

import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from qwen_jax.data.arc import BadRecord, Row, parse_row_line, task_from_row
from qwen_jax.errors import StorageError
from qwen_jax.hardware import this_machines_cores

CHUNK_ROWS = 128


@dataclass(frozen=True)
class Rejected:
    """A source row that gets no line."""

    row: int
    reason: str


def stream_lines(
    rows: Iterable[Row], column_name: str, reject: Callable[[Rejected], None]
) -> Iterator[bytes]:
    """Source rows as stream lines; those that cannot be used go to `reject`. The order is that of `rows`.

    A few chunks of rows are under way at a time, so memory does not grow with their number.
    Raises StorageError where the source itself cannot be read on.
    """
    try:
        for line in chain.from_iterable(_converted_chunks(iter(rows), column_name)):
            if isinstance(line, Rejected):
                reject(line)
            else:
                yield line
    except BrokenProcessPool as error:
        raise StorageError(
            "a process that converts rows was killed (is the machine out of memory?); start again"
        ) from error
    except OSError as error:
        raise StorageError(
            f"the dataset cannot be read: {error}; check --dataset_name and its permissions"
        ) from error


def _converted_chunks(rows: Iterator[Row], column_name: str) -> Iterator[list[bytes | Rejected]]:
    chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    # A small dataset is done before processes have started; so is the first chunk of a large one.
    yield _convert_chunk(next(chunks, []), column_name)
    second, cores = next(chunks, None), len(this_machines_cores())
    if second is None:
        return
    if cores == 1:
        yield from (_convert_chunk(chunk, column_name) for chunk in chain([second], chunks))
        return
    with ProcessPoolExecutor(cores, multiprocessing.get_context("forkserver")) as pool:
        under_way: deque[Future[list[bytes | Rejected]]] = deque()
        for chunk in chain([second], chunks):
            under_way.append(pool.submit(_convert_chunk, chunk, column_name))
            if len(under_way) > 2 * cores:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _convert_chunk(chunk: list[Row], column_name: str) -> list[bytes | Rejected]:
    return [_convert_row(index, row, column_name) for index, row in chunk]


def _convert_row(index: int, row: dict[str, Any] | bytes | BadRecord, column_name: str) -> bytes | Rejected:
    try:
        if isinstance(row, BadRecord):
            raise row
        if isinstance(row, bytes):
            row = parse_row_line(row)
        return encode_line(task_from_row(row, column_name, f"row-{index}"))
    except BadRecord as bad:
        return Rejected(index, str(bad))


def encode_line(record: dict[str, Any]) -> bytes:
    """One record as a stream line: compact JSON, UTF-8, newline."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
