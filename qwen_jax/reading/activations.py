"""Rows of one layer in batches, shuffled and resumable: what a trainer of SAEs or probes reads."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from qwen_jax.errors import UsageError
from qwen_jax.reading.runs import Run, open_runs, runs_with_layer
from qwen_jax.reading.samples import Layer, row_arrays, shard_samples
from qwen_jax.roles import RoleSet

Keep = Callable[[dict[str, Any]], np.ndarray] | str | None

READERS = 2
"""Threads that read and unpack shards, each one shard ahead."""
_PIECE_ROWS = 4096


class Rows(NamedTuple):
    """A batch with what its rows are: activations [batch, hidden], the rest as samples.row_arrays says."""

    activations: np.ndarray
    token_ids: np.ndarray
    sample_idx: np.ndarray
    worker_id: np.ndarray
    token_positions: np.ndarray
    token_roles: np.ndarray
    token_cells: np.ndarray


@dataclass(frozen=True)
class Cursor:
    """How far an iteration is: in epoch `epoch`, `batches` of its batches were given out.

    arguments: a digest of what decides the batches, so that a cursor is used with the same arguments only.
    """

    epoch: int
    batches: int
    arguments: str

    @classmethod
    def parse(cls, fields: Any, arguments: str) -> Self:
        """From `as_dict`; raises UsageError for anything else, and for other arguments."""
        try:
            cursor = cls(**fields)
            whole = cursor.epoch >= 0 and cursor.batches >= 0
        except TypeError:
            whole = False
        if not whole:
            raise UsageError(f"{fields!r} is not a cursor; give what `.cursor` of an earlier iteration was")
        if cursor.arguments != arguments:
            raise UsageError(
                "the cursor belongs to an iteration with other arguments or over other shards; give the same ones"
            )
        return cursor

    def as_dict(self) -> dict[str, int | str]:
        """For a JSON file."""
        return asdict(self)


def iter_activations(
    path: str | Path,
    layer: Layer,
    batch_size: int,
    shuffle_buffer: int = 0,
    seed: int = 0,
    *,
    keep: Keep = None,
    kind: str | None = None,
    as_float32: bool = True,
    with_tokens: bool = False,
    epochs: int = 1,
    cursor: dict[str, int | str] | None = None,
) -> "ActivationBatches":
    """Batches of rows of one layer at `path` (see open_runs), of one worker or many.

    Args:
        layer: as in the shards; `"embedding"` for the embedding output. Workers that do not store it are left out.
        batch_size: rows of a batch; the last one of an epoch may be smaller.
        shuffle_buffer: rows to draw from at random; with it the shards come in random order too. 0 keeps order.
        seed: the same one gives the same batches; each epoch is shuffled anew.
        keep: which rows of a sample (a dict as iter_samples gives it): a function to a bool array, or
            `"role:test_input,answer"` in the words of --keep_tokens. None is all.
        kind: which of several stored kinds; None is the main one.
        as_float32: cast; else the stored dtype.
        with_tokens: yield Rows instead of arrays.
        epochs: times to go through all.
        cursor: `ActivationBatches.cursor` of an earlier iteration with the same arguments, to go on behind it. Whole
            epochs are skipped at once, and without shuffle_buffer and keep whole shards too; else the epoch is read
            again up to there.

    Returns:
        An iterator of [batch, hidden] arrays. READERS threads read ahead; in memory are that layer of READERS + 1
        shards, the shuffle buffer in the stored dtype, and a batch.

    Raises:
        UsageError: arguments that do not fit together, a layer or kind that is not stored. ShardError and
        BadDataError, while iterating: see load_shard.
    """
    if batch_size < 1 or shuffle_buffer < 0 or epochs < 1:
        raise UsageError("batch_size and epochs are at least 1, shuffle_buffer at least 0")
    shards = [(run, name) for run in runs_with_layer(open_runs(path), layer) for name in run.shards]
    order = _Order(batch_size, shuffle_buffer, seed)
    said = keep if isinstance(keep, str) or keep is None else "a function"
    arguments = _digest([layer, kind, said, asdict(order)], shards)
    start = Cursor(0, 0, arguments) if cursor is None else Cursor.parse(cursor, arguments)
    source = _Source(shards, layer, _row_mask(keep), kind)
    return ActivationBatches(source, order, start, epochs, as_float32=as_float32, with_tokens=with_tokens)


def _digest(arguments: Sequence[Any], shards: Sequence[tuple[Run, str]]) -> str:
    about = [[run.worker_id, name, (run.entry(name) or {}).get("crc32c")] for run, name in shards]
    return hashlib.sha256(json.dumps([arguments, about]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Order:
    """What decides the order of rows; see iter_activations."""

    batch_size: int
    shuffle_buffer: int
    seed: int

    def shards_of(self, epoch: int, count: int) -> tuple[np.ndarray, np.random.Generator]:
        """The order of `count` shards, and the generator that goes on to shuffle their rows."""
        rng = np.random.default_rng([self.seed, epoch])
        numbers = np.arange(count)
        if self.shuffle_buffer:
            rng.shuffle(numbers)
        return numbers, rng


class ActivationBatches:
    """An iterator of batches that knows how far it is."""

    def __init__(
        self,
        source: "_Source",
        order: _Order,
        start: Cursor,
        epochs: int,
        *,
        as_float32: bool,
        with_tokens: bool,
    ):
        self._as_float32 = as_float32
        self._with_tokens = with_tokens
        self._now = start
        self._batches = self._all(source, order, start, epochs)

    @property
    def cursor(self) -> dict[str, int | str]:
        """What iter_activations needs to go on with the next batch; goes into JSON as it is."""
        return self._now.as_dict()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray | Rows:
        self._now, rows = next(self._batches)
        if self._as_float32:
            rows = rows._replace(activations=rows.activations.astype(np.float32, copy=False))
        return rows if self._with_tokens else rows.activations

    @staticmethod
    def _all(source: "_Source", order: _Order, start: Cursor, epochs: int) -> Iterator[tuple[Cursor, Rows]]:
        """Each batch, with the cursor behind it."""
        for epoch in range(start.epoch, epochs):
            done = start.batches if epoch == start.epoch else 0
            for number, rows in enumerate(_batches(source, order, epoch, done), done + 1):
                yield Cursor(epoch, number, start.arguments), rows


class _Source:
    """Rows of one layer, shard by shard."""

    def __init__(
        self,
        shards: Sequence[tuple[Run, str]],
        layer: Layer,
        mask: Callable[[dict[str, Any]], np.ndarray] | None,
        kind: str | None,
    ):
        self.shards = shards
        self._layer = layer
        self._mask = mask
        self._kind = kind

    def known_rows(self, number: int) -> int | None:
        """How many rows shard `number` gives, where that is known without reading it."""
        run, name = self.shards[number]
        entry = run.entry(name)
        return entry["tokens"] if entry is not None and self._mask is None else None

    def read(self, number: int) -> list[Rows]:
        """Of shard `number`, the kept rows in the stored dtype, one entry a sample."""
        run, name = self.shards[number]
        samples = shard_samples(run, name, [self._layer], self._kind)
        return [rows for rows in map(self._rows, samples) if len(rows.token_ids)]

    def _rows(self, sample: dict[str, Any]) -> Rows:
        rows = Rows(activations=sample["activations"][self._layer], **row_arrays(sample))
        return rows if self._mask is None else _take(rows, self._mask(sample))


def _row_mask(keep: Keep) -> Callable[[dict[str, Any]], np.ndarray] | None:
    if keep is None or callable(keep):
        return keep
    word, _, names = keep.partition(":")
    if word != "role":
        raise UsageError(f"keep {keep!r}: give a function, or role:NAME,NAME")
    roles = RoleSet(names.split(","))

    def mask(sample: dict[str, Any]) -> np.ndarray:
        if "token_roles" not in sample:
            raise UsageError(
                f"sample {sample['sample_idx']} has no token_roles; select rows by a function instead"
            )
        return roles.mask(sample["token_roles"])

    return mask


def _batches(source: _Source, order: _Order, epoch: int, done: int) -> Iterator[Rows]:
    """The batches of one epoch behind its first `done`."""
    numbers, rng = order.shards_of(epoch, len(source.shards))
    skip = done * order.batch_size
    if not order.shuffle_buffer:
        numbers, skip = _without_whole_shards(source, numbers, skip)
    shards = _read_ahead(source.read, numbers.tolist())
    pieces: Iterator[Rows] = (rows for shard in shards for rows in shard)
    if order.shuffle_buffer:
        pieces = _shuffled(pieces, order.shuffle_buffer, rng)
    yield from _cut(_behind(pieces, skip), order.batch_size)


def _without_whole_shards(source: _Source, numbers: np.ndarray, skip: int) -> tuple[np.ndarray, int]:
    """The shards from the one that holds row `skip` on, and the rows of that one to skip."""
    for place, number in enumerate(numbers):
        known = source.known_rows(number)
        if known is None or known > skip:
            return numbers[place:], skip
        skip -= known
    return numbers[:0], skip


def _read_ahead(read: Callable[[int], list[Rows]], numbers: Iterable[int]) -> Iterator[list[Rows]]:
    """What `read` gives for each number, in order, READERS of them being read meanwhile; its errors are raised here."""
    under_way: deque[Future[list[Rows]]] = deque()
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="shards")
    try:
        for number in numbers:
            under_way.append(pool.submit(read, number))
            if len(under_way) > READERS:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _shuffled(pieces: Iterable[Rows], size: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Fills a buffer of `size` rows; each further row takes the place of a random one, which is given out."""
    buffer: Rows | None = None
    filled = 0
    for piece in pieces:
        if buffer is None:
            buffer = Rows(*(np.empty((size, *array.shape[1:]), array.dtype) for array in piece))
        first = min(size - filled, len(piece.token_ids))
        _put(buffer, slice(filled, filled + first), _take(piece, slice(0, first)))
        filled += first
        # A quarter at a time: what replaced the whole buffer at once would mix nothing with what comes later.
        for rows in _in_pieces(_take(piece, slice(first, None)), max(1, size // 4)):
            places = rng.choice(size, len(rows.token_ids), replace=False)
            yield _take(buffer, places)
            _put(buffer, places, rows)
    if buffer is not None:
        left = rng.permutation(filled)
        for start in range(0, filled, _PIECE_ROWS):
            yield _take(buffer, left[start : start + _PIECE_ROWS])


def _in_pieces(rows: Rows, size: int) -> Iterator[Rows]:
    for start in range(0, len(rows.token_ids), size):
        yield _take(rows, slice(start, start + size))


def _behind(pieces: Iterable[Rows], skip: int) -> Iterator[Rows]:
    """The rows behind the first `skip`."""
    for rows in pieces:
        if skip < len(rows.token_ids):
            yield _take(rows, slice(skip, None))
        skip = max(0, skip - len(rows.token_ids))


def _cut(pieces: Iterable[Rows], batch_size: int) -> Iterator[Rows]:
    held: list[Rows] = []
    count = 0
    for rows in pieces:
        held.append(rows)
        count += len(rows.token_ids)
        if count < batch_size:
            continue
        joined, start = _join(held), 0
        while count - start >= batch_size:
            yield _take(joined, slice(start, start + batch_size))
            start += batch_size
        held, count = [_take(joined, slice(start, None))], count - start
    if count:
        yield _join(held)


def _join(pieces: list[Rows]) -> Rows:
    return Rows(*map(np.concatenate, zip(*pieces, strict=True))) if len(pieces) > 1 else pieces[0]


def _take(rows: Rows, index: np.ndarray | slice) -> Rows:
    return Rows(*(array[index] for array in rows))


def _put(buffer: Rows, index: np.ndarray | slice, rows: Rows) -> None:
    for array, values in zip(buffer, rows, strict=True):
        array[index] = values
