"""Rows of one layer in batches, shuffled and resumable: what a trainer of SAEs or probes reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from qwen_jax.errors import UsageError
from qwen_jax.prefetch import prefetch
from qwen_jax.reading.runs import Run, open_runs
from qwen_jax.reading.samples import Layer, shard_samples
from qwen_jax.roles import RoleSet

Keep = Callable[[dict[str, Any]], np.ndarray] | str | None


class Rows(NamedTuple):
    """A batch with what its rows are: activations [batch, hidden]; the rest int32 [batch]."""

    activations: np.ndarray
    token_ids: np.ndarray
    sample_idx: np.ndarray


@dataclass(frozen=True)
class Cursor:
    """How far an iteration is: batches given out, of an iteration with these arguments."""

    batches: int
    seed: int
    batch_size: int
    shuffle_buffer: int

    def as_dict(self) -> dict[str, int]:
        """For a JSON file."""
        return dict(vars(self))


def iter_activations(
    path: str | Path,
    layer: Layer,
    batch_size: int,
    *,
    shuffle_buffer: int = 0,
    seed: int = 0,
    keep: Keep = None,
    kind: str | None = None,
    as_float32: bool = True,
    with_tokens: bool = False,
    epochs: int = 1,
    cursor: dict[str, int] | None = None,
) -> "ActivationBatches":
    """Batches of rows of one layer at `path` (see open_runs), of one worker or many.

    Args:
        layer: as in the shards; `"embedding"` for the embedding output.
        batch_size: rows of a batch; the last one of an epoch may be smaller.
        shuffle_buffer: rows to draw from at random; with it the shards come in random order too. 0 keeps order.
        seed: the same one gives the same batches; each epoch is shuffled anew.
        keep: which rows of a sample (a dict as iter_samples gives it): a function to a bool array, or
            `"role:test_input,answer"` in the words of --keep_tokens. None is all.
        kind: which of several stored kinds; None is the main one.
        as_float32: cast; else the stored dtype.
        with_tokens: yield Rows instead of arrays.
        epochs: times to go through all.
        cursor: `ActivationBatches.cursor` of an earlier iteration with the same arguments, to go on behind it.

    Returns:
        An iterator of [batch, hidden] arrays. A thread reads one shard ahead; in memory are that layer of two
        shards, the shuffle buffer and a batch.

    Raises:
        UsageError: arguments that do not fit together. ShardError and BadDataError, while iterating: see load_shard.
    """
    if batch_size < 1 or shuffle_buffer < 0 or epochs < 1:
        raise UsageError("batch_size and epochs are at least 1, shuffle_buffer at least 0")
    start = Cursor(0, seed, batch_size, shuffle_buffer)
    if cursor is not None:
        start = Cursor(**cursor)
        if (start.seed, start.batch_size, start.shuffle_buffer) != (seed, batch_size, shuffle_buffer):
            raise UsageError(f"the cursor {cursor} belongs to an iteration with other arguments")
    shards = [(run, name) for run in open_runs(path) for name in run.shards]
    source = _Source(shards, layer, _row_mask(keep), kind, as_float32)
    return ActivationBatches(source, start, epochs, with_tokens)


class ActivationBatches:
    """An iterator of batches that knows how far it is."""

    def __init__(self, source: "_Source", start: Cursor, epochs: int, with_tokens: bool):
        self._start = start
        self._given = 0
        self._with_tokens = with_tokens
        self._batches = _batches(source, start, epochs)

    @property
    def cursor(self) -> dict[str, int]:
        """What iter_activations needs to go on with the next batch; goes into JSON as it is."""
        return Cursor(max(self._given, self._start.batches), *list(vars(self._start).values())[1:]).as_dict()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray | Rows:
        while True:
            rows = next(self._batches)
            self._given += 1
            if self._given > self._start.batches:
                return rows if self._with_tokens else rows.activations


class _Source:
    """Rows of one layer, shard by shard."""

    def __init__(
        self,
        shards: list[tuple[Run, str]],
        layer: Layer,
        mask: Callable[[dict[str, Any]], np.ndarray] | None,
        kind: str | None,
        as_float32: bool,
    ):
        self.shards = shards
        self._layer = layer
        self._mask = mask
        self._kind = kind
        self._as_float32 = as_float32

    def read(self, number: int) -> list[Rows]:
        """Of shard `number`, the kept rows, one entry a sample."""
        run, name = self.shards[number]
        return [
            rows for each in shard_samples(run, name, [self._layer], self._kind) for rows in self._rows(each)
        ]

    def _rows(self, sample: dict[str, Any]) -> Iterator[Rows]:
        values, tokens = sample["activations"][self._layer], sample["token_ids"]
        if self._mask is not None:
            kept = self._mask(sample)
            values, tokens = values[kept], tokens[kept]
        if len(values):
            values = values.astype(np.float32) if self._as_float32 else values
            yield Rows(values, tokens, np.full(len(tokens), sample["sample_idx"], np.int32))


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


def _batches(source: _Source, start: Cursor, epochs: int) -> Iterator[Rows]:
    for epoch in range(epochs):
        rng = np.random.default_rng([start.seed, epoch])
        order = np.arange(len(source.shards))
        if start.shuffle_buffer:
            rng.shuffle(order)
        shards = prefetch((source.read(int(number)) for number in order), depth=1)
        pieces = (rows for shard in shards for rows in shard)
        if start.shuffle_buffer:
            pieces = _shuffled(pieces, start.shuffle_buffer, rng)
        yield from _cut(pieces, start.batch_size)


def _shuffled(pieces: Iterator[Rows], size: int, rng: np.random.Generator) -> Iterator[Rows]:
    """Collects about twice `size` rows, gives half of them out in random order, and so on."""
    held: list[Rows] = []
    count = 0
    for rows in pieces:
        held.append(rows)
        count += len(rows.token_ids)
        if count >= 2 * size:
            mixed = _take(_join(held), rng.permutation(count))
            yield _take(mixed, slice(0, count - size))
            held, count = [_take(mixed, slice(count - size, None))], size
    if held:
        yield _take(_join(held), rng.permutation(count))


def _cut(pieces: Iterator[Rows], batch_size: int) -> Iterator[Rows]:
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
