"""Rows of one layer in batches, shuffled and resumable: what a trainer of SAEs or probes reads."""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from qwen_jax.errors import UsageError
from qwen_jax.reading.runs import Run, open_runs, refuse_mixed, runs_with_layer
from qwen_jax.reading.samples import Fetched, Layer, fetch, row_arrays, samples_in
from qwen_jax.roles import RoleSet

Keep = Callable[[dict[str, Any]], np.ndarray] | str | None

READERS = 2
"""Threads that unpack shards, each one shard ahead; as many shards more are fetched ahead of them."""
_PIECE_ROWS = 512

Columns = tuple[np.ndarray, ...]
"""Arrays over the same n rows: activations [n, hidden], and with tokens the rest of Rows."""


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
    shards_at_once: int = 1,
    keep: Keep = None,
    kind: str | None = None,
    as_float32: bool = True,
    with_tokens: bool = False,
    epochs: int = 1,
    cursor: dict[str, int | str] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> "ActivationBatches":
    """Batches of rows of one layer at `path` (see open_runs), of one worker or many.

    Args:
        layer: as in the shards; `"embedding"` for the embedding output. Workers that do not store it are left out.
        batch_size: rows of a batch; the last one of an epoch may be smaller.
        shuffle_buffer: rows to draw from at random; with it the shards come in random order too. 0 keeps order.
        seed: the same one gives the same batches; each epoch is shuffled anew.
        shards_at_once: of how many shards the rows come that enter the shuffle buffer, in random order. More make two
            rows of a batch come from one sample less often.
        keep: which rows of a sample (a dict as iter_samples gives it): a function to a bool array, or
            `"role:test_input,answer"` in the words of --keep_tokens. None is all.
        kind: which of several stored kinds; None is the main one.
        as_float32: cast; else the stored dtype, if that is no quantised one.
        with_tokens: yield Rows instead of arrays.
        epochs: times to go through all.
        cursor: `ActivationBatches.cursor` of an earlier iteration with the same arguments, to go on behind it. Whole
            epochs are skipped at once, and without shuffle_buffer and keep whole shards too; else the epoch is read
            again up to there.
        process_index, process_count: which of how many processes asks. Each reads shards of its own, so that together
            they read every row once an epoch; the numbers of their batches may differ.

    Returns:
        An iterator of [batch, hidden] arrays. READERS threads read ahead; in memory are that layer of READERS +
        shards_at_once shards, the shuffle buffer in the stored dtype, and a batch. Of a bucket, that layer of some more
        shards lies in temporary files.

    Raises:
        UsageError: arguments that do not fit together, a layer or kind that is not stored, runs of different kinds,
        models or stored dtypes, too few shards. ShardError and BadDataError, while iterating: see load_shard.
    """
    reading = Reading(
        layer, batch_size, shuffle_buffer, seed, shards_at_once, keep, kind, as_float32, with_tokens
    )
    shards = share_of(open_shards(path, layer, kind), process_index, process_count)
    return reading.batches(shards, epochs, cursor)


Shard = tuple[Run, str]
"""A run and the name of one of its shards."""


def open_shards(path: str | Path, layer: Layer, kind: str | None = None) -> list[Shard]:
    """The shards at `path` that store the layer, or may; raises UsageError where none does, and where their rows are of
    different kinds, models or dtypes."""
    runs = runs_with_layer(open_runs(path), layer)
    refuse_mixed(runs, layer, kind)
    return [(run, name) for run in runs for name in run.shards]


def share_of(shards: Sequence[Shard], process_index: int, process_count: int) -> Sequence[Shard]:
    """Those of one process of several; raises UsageError where that has none."""
    if not 0 <= process_index < process_count:
        raise UsageError(f"process_index {process_index} is none of process_count {process_count}")
    if len(shards) < process_count > 1:
        raise UsageError(
            f"{len(shards)} shards cannot be divided over {process_count} processes; use fewer of these"
        )
    return shards[process_index::process_count]


@dataclass(frozen=True)
class Reading:
    """What is read of shards, and in which order; iter_activations says what each field means."""

    layer: Layer
    batch_size: int
    shuffle_buffer: int = 0
    seed: int = 0
    shards_at_once: int = 1
    keep: Keep = None
    kind: str | None = None
    as_float32: bool = True
    with_tokens: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shuffle_buffer < 0 or self.shards_at_once < 1:
            raise UsageError("batch_size and shards_at_once are at least 1, shuffle_buffer at least 0")
        if self.shards_at_once > 1 and not self.shuffle_buffer:
            raise UsageError("shards_at_once mixes what is shuffled: give a shuffle_buffer too")

    def batches(
        self, shards: Sequence[Shard], epochs: int = 1, cursor: dict[str, int | str] | None = None
    ) -> "ActivationBatches":
        """What iter_activations gives of these shards."""
        if epochs < 1:
            raise UsageError("epochs are at least 1")
        arguments = self.digest(shards)
        start = Cursor(0, 0, arguments) if cursor is None else Cursor.parse(cursor, arguments)
        return ActivationBatches(_Source(self, shards), start, epochs)

    def known_batches(self, shards: Sequence[Shard]) -> int | None:
        """How many batches an epoch of these shards has, where that is known without reading them."""
        source = _Source(self, shards)
        rows = [source.known_rows(number) for number in range(len(shards))]
        known = [count for count in rows if count is not None]
        return -(-sum(known) // self.batch_size) if len(known) == len(rows) else None

    def shards_of(self, epoch: int, count: int) -> tuple[np.ndarray, np.random.Generator]:
        """The order of `count` shards, and the generator that goes on to shuffle their rows."""
        rng = np.random.default_rng([self.seed, epoch])
        numbers = np.arange(count)
        if self.shuffle_buffer:
            rng.shuffle(numbers)
        return numbers, rng

    def digest(self, shards: Sequence[Shard]) -> str:
        """Of what decides the batches; a cursor has it as `arguments`."""
        said = self.keep if isinstance(self.keep, str) or self.keep is None else "a function"
        order = {name: getattr(self, name) for name in ("batch_size", "shuffle_buffer", "seed")}
        if self.shards_at_once > 1:
            order["shards_at_once"] = self.shards_at_once
        about = [[run.worker_id, name, (run.entry(name) or {}).get("crc32c")] for run, name in shards]
        arguments = [[self.layer, self.kind, said, order], about]
        return hashlib.sha256(json.dumps(arguments, default=int).encode()).hexdigest()[:16]


class ActivationBatches:
    """An iterator of batches that knows how far it is."""

    def __init__(self, source: "_Source", start: Cursor, epochs: int):
        self._with_tokens = source.reading.with_tokens
        self._now = start
        self._batches = self._all(source, start, epochs)

    @property
    def cursor(self) -> dict[str, int | str]:
        """What iter_activations needs to go on with the next batch; goes into JSON as it is."""
        return self._now.as_dict()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray | Rows:
        self._now, columns = next(self._batches)
        return Rows(*columns) if self._with_tokens else columns[0]

    @staticmethod
    def _all(source: "_Source", start: Cursor, epochs: int) -> Iterator[tuple[Cursor, Columns]]:
        """Each batch, with the cursor behind it."""
        for epoch in range(start.epoch, epochs):
            done = start.batches if epoch == start.epoch else 0
            if done and done == source.reading.known_batches(source.shards):
                continue
            for number, columns in enumerate(_batches(source, epoch, done), done + 1):
                yield Cursor(epoch, number, start.arguments), columns


class _Source:
    """Rows of one layer, shard by shard."""

    def __init__(self, reading: Reading, shards: Sequence[Shard]):
        self.reading = reading
        self.shards = shards
        self._mask = _row_mask(reading.keep)

    def known_rows(self, number: int) -> int | None:
        """How many rows shard `number` gives, where that is known without reading it."""
        run, name = self.shards[number]
        entry = run.entry(name)
        return entry["tokens"] if entry is not None and self._mask is None else None

    def fetch(self, number: int) -> Fetched:
        """What of shard `number` is to be read, on this machine."""
        return fetch(*self.shards[number], [self.reading.layer])

    def read(self, fetched: Future[Fetched]) -> list[Columns]:
        """Of a shard, the kept rows in the stored dtype, one entry a sample."""
        shard = fetched.result()
        with shard.turn:
            samples = samples_in(shard, [self.reading.layer], self.reading.kind)
            return [columns for columns in map(self._columns, samples) if len(columns[0])]

    def _columns(self, sample: dict[str, Any]) -> Columns:
        rows = sample["activations"][self.reading.layer]
        columns = Rows(activations=rows, **row_arrays(sample)) if self.reading.with_tokens else (rows,)
        return columns if self._mask is None else _take(columns, self._mask(sample))


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


def _batches(source: _Source, epoch: int, done: int) -> Iterator[Columns]:
    """The batches of one epoch behind its first `done`."""
    reading = source.reading
    numbers, rng = reading.shards_of(epoch, len(source.shards))
    skip = done * reading.batch_size
    if not reading.shuffle_buffer:
        numbers, skip = _without_whole_shards(source, numbers, skip)
    shards = _read_ahead(source, numbers.tolist())
    if reading.shards_at_once > 1:
        pieces = _mixed(shards, reading.shards_at_once, rng)
    else:
        pieces = (columns for shard in shards for columns in shard)
    if reading.shuffle_buffer:
        pieces = _shuffled(pieces, reading.shuffle_buffer, rng)
    yield from _cut(_behind(pieces, skip), reading.batch_size, np.float32 if reading.as_float32 else None)


def _without_whole_shards(source: _Source, numbers: np.ndarray, skip: int) -> tuple[np.ndarray, int]:
    """The shards from the one that holds row `skip` on, and the rows of that one to skip."""
    for index, number in enumerate(numbers):
        known = source.known_rows(number)
        if known is None or known > skip:
            return numbers[index:], skip
        skip -= known
    return numbers[:0], skip


def _read_ahead(source: _Source, numbers: Iterable[int]) -> Iterator[list[Columns]]:
    """The rows of each shard, in order. Meanwhile READERS shards are unpacked, and as many behind them fetched; errors
    of both are raised here."""
    fetchers = ThreadPoolExecutor(2 * READERS, thread_name_prefix="fetch")
    readers = ThreadPoolExecutor(READERS, thread_name_prefix="shards")
    is_finalizing = sys.is_finalizing
    try:
        fetched = _ahead(lambda number: fetchers.submit(source.fetch, number), numbers, READERS)
        # By map, which keeps no shard alive that was given out.
        yield from map(
            Future.result, _ahead(lambda file: readers.submit(source.read, file), fetched, READERS)
        )
    finally:
        if not is_finalizing():  # else Python has joined the threads, and its modules may be gone
            fetchers.shutdown(cancel_futures=True)
            readers.shutdown(cancel_futures=True)


def _ahead(begin: Callable[[Any], Future], items: Iterable[Any], count: int) -> Iterator[Future]:
    """Begins on each item, and gives what that returned when `count` more have been begun."""
    begun: deque[Future] = deque()
    for item in items:
        begun.append(begin(item))
        if len(begun) > count:
            yield begun.popleft()
    while begun:
        yield begun.popleft()


def _mixed(shards: Iterable[list[Columns]], at_once: int, rng: np.random.Generator) -> Iterator[Columns]:
    """The rows of `at_once` shards in turn, each in random order; a shard that is used up makes room for the next."""
    drawn: deque[Iterator[Columns]] = deque()
    for shard in shards:
        drawn.append(_drawn(_join(shard), rng) if shard else iter(()))
        del shard  # it is there as a copy now
        if len(drawn) == at_once:
            yield from _until_one_ends(drawn)
    while drawn:
        yield from _until_one_ends(drawn)


def _drawn(columns: Columns, rng: np.random.Generator) -> Iterator[Columns]:
    order = rng.permutation(len(columns[0]))
    for start in range(0, len(order), _PIECE_ROWS):
        yield _take(columns, order[start : start + _PIECE_ROWS])


def _until_one_ends(drawn: deque[Iterator[Columns]]) -> Iterator[Columns]:
    """A piece of each in turn; the one that ends is taken out."""
    while (piece := next(drawn[0], None)) is not None:
        yield piece
        drawn.rotate(-1)
    drawn.popleft()


def _shuffled(pieces: Iterable[Columns], size: int, rng: np.random.Generator) -> Iterator[Columns]:
    """Fills a buffer of `size` rows; each further row takes the place of a random one, which is given out."""
    buffer: Columns | None = None
    filled = 0
    for piece in pieces:
        if buffer is None:
            buffer = tuple(np.empty((size, *array.shape[1:]), array.dtype) for array in piece)
        first = min(size - filled, len(piece[0]))
        _put(buffer, slice(filled, filled + first), _take(piece, slice(0, first)))
        filled += first
        # A quarter at a time: what replaced the whole buffer at once would mix nothing with what comes later.
        for columns in _in_pieces(_take(piece, slice(first, None)), max(1, size // 4)):
            taken = rng.choice(size, len(columns[0]), replace=False)
            yield _take(buffer, taken)
            _put(buffer, taken, columns)
    if buffer is not None:
        left = rng.permutation(filled)
        for start in range(0, filled, _PIECE_ROWS):
            yield _take(buffer, left[start : start + _PIECE_ROWS])


def _in_pieces(columns: Columns, size: int) -> Iterator[Columns]:
    for start in range(0, len(columns[0]), size):
        yield _take(columns, slice(start, start + size))


def _behind(pieces: Iterable[Columns], skip: int) -> Iterator[Columns]:
    """The rows behind the first `skip`."""
    for columns in pieces:
        if skip < len(columns[0]):
            yield _take(columns, slice(skip, None))
        skip = max(0, skip - len(columns[0]))


def _cut(pieces: Iterable[Columns], batch_size: int, dtype: type[np.float32] | None) -> Iterator[Columns]:
    """Batches, joined and cast in one step."""
    held: list[Columns] = []
    missing = batch_size
    for columns in pieces:
        # Up to where the batch is full, then whole batches, then what is left.
        for piece in (
            _take(columns, slice(0, missing)),
            *_in_pieces(_take(columns, slice(missing, None)), batch_size),
        ):
            held.append(piece)
            missing -= len(piece[0])
            if not missing:
                yield _join(held, dtype)
                held, missing = [], batch_size
    if held:
        yield _join(held, dtype)


def _join(pieces: Sequence[Columns], dtype: type[np.float32] | None = None) -> Columns:
    """dtype: of the activations; None leaves them as they are."""
    activations, *rest = zip(*pieces, strict=True)
    dtype = dtype or activations[0].dtype
    return np.concatenate(activations, dtype=dtype), *map(np.concatenate, rest)


def _take(columns: Columns, index: np.ndarray | slice) -> Columns:
    return tuple(array[index] for array in columns)


def _put(buffer: Columns, index: np.ndarray | slice, columns: Columns) -> None:
    for array, values in zip(buffer, columns, strict=True):
        array[index] = values
