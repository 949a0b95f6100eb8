"""Samples -> rows of tokens, one a device -> steps of a fixed number of tokens.

A device's samples lie one behind the other in an endless row. A step takes the next tokens of every row, whatever
samples they belong to; a sample that does not fit goes on in the next step. So there is one shape, nothing is sorted
or looked ahead for, and only at the end of a run does a step hold positions that belong to no sample.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np

from qwen_jax.data.prompts import TokenizedSample

_UNIT_TOKENS = 2048
_UNIT_TOKENS_ON_CPU = 256
BLOCK_TOKENS = 256
_KEPT_SIZES = 4
# Any token id does: nothing that is kept sees these positions.
_NO_TOKEN = 0


@dataclass(frozen=True)
class StepShape:
    """What all steps of a run have in common.

    tokens: of each row in a step. positions: of a row that later steps can see, no fewer than the longest sample has
    tokens. rows: one for each device or group of devices that shares the weights. page: a sample starts at a multiple
    of so many tokens of its row, of which `tokens` and `positions` are multiples.
    """

    tokens: int
    positions: int
    rows: int = 1
    page: int = 1

    @classmethod
    def of(cls, tokens: int, positions: int, rows: int = 1, page: int = 1) -> Self:
        """With at least so many tokens and positions."""
        return cls(_up(tokens, page), _up(positions, page), rows, page)

    @property
    def per_step(self) -> int:
        """Tokens of all rows in a step."""
        return self.tokens * self.rows

    @property
    def kept_sizes(self) -> list[int]:
        """How many tokens of a step may be kept, ascending: few sizes, each of which compiles a program."""
        return sorted({-(-self.tokens >> 2 * n) for n in range(_KEPT_SIZES)})

    @property
    def block_tokens(self) -> int:
        """Kept tokens of a sample whose statistics are taken together, counted from the sample's first one."""
        return BLOCK_TOKENS

    @property
    def blocks(self) -> int:
        """Blocks that are summed up at once."""
        return self.tokens // BLOCK_TOKENS + 16


def step_tokens(batch_size: int, max_seq_length: int, on_cpu: bool) -> int:
    """Tokens that --batch_size means for each row of a step: in units of 2,048, of max_seq_length where that is
    smaller, and of 256 on a CPU, whose cache holds no more (benchmarks/forward.py)."""
    return batch_size * min(_UNIT_TOKENS_ON_CPU if on_cpu else _UNIT_TOKENS, max_seq_length)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class Part:
    """The tokens `start` to `stop` of a sample, which stand in row `row` of a step from `offset` on.

    kept_offset, block_offset, answer_offset: where what is kept of them, the blocks that they complete and the answers
    that they foretell begin among those of the row.
    """

    sample: TokenizedSample
    row: int
    offset: int
    start: int
    stop: int
    kept_offset: int = 0
    block_offset: int = 0
    answer_offset: int = 0

    def after(self, sample: TokenizedSample, offset: int, start: int, stop: int) -> Self:
        """The part that follows in the row."""
        return type(self)(
            sample,
            self.row,
            offset,
            start,
            stop,
            self.kept_rows.stop,
            self.block_rows.stop,
            self.answer_rows.stop,
        )

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.sample.token_ids)

    @cached_property
    def kept(self) -> range:
        """Which of the sample's kept tokens these are."""
        return self._between(self.sample.positions)

    @cached_property
    def answered(self) -> range:
        """Which of the sample's answer tokens are foretold here, each by the token before it."""
        return self._between(self.sample.answer_positions, before=1)

    def _between(self, positions: np.ndarray | None, before: int = 0) -> range:
        if positions is None:
            return range(self.start, self.stop)
        return range(*np.searchsorted(positions, [self.start + before, self.stop + before]).tolist())

    def offsets(self, positions: np.ndarray, chosen: range) -> np.ndarray:
        """Where the `chosen` ones of the sample's `positions` stand in the row."""
        return positions[chosen.start : chosen.stop] + (self.offset - self.start)

    @property
    def kept_rows(self) -> slice:
        return slice(self.kept_offset, self.kept_offset + len(self.kept))

    @property
    def block_rows(self) -> slice:
        return slice(self.block_offset, self.block_offset + len(list(self.blocks())))

    @property
    def answer_rows(self) -> slice:
        return slice(self.answer_offset, self.answer_offset + len(self.answered))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Offset among the row's kept tokens and size of each block of BLOCK_TOKENS that these tokens complete.

        The offset is negative for a block that began in an earlier step.
        """
        first = self.kept.start - self.kept.start % BLOCK_TOKENS
        for start in range(first, self.kept.stop, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, self.sample.n_kept)
            if self.kept.start < stop <= self.kept.stop:
                yield self.kept_offset + start - self.kept.start, stop - start


@dataclass(frozen=True)
class Step:
    """One step of all rows.

    tokens_XT, positions_XT: int32 [rows, tokens]; positions of tokens in their samples, from 0 on also where no sample
    is. parts: what of the step belongs to which sample, row by row.
    """

    shape: StepShape
    tokens_XT: np.ndarray
    positions_XT: np.ndarray
    parts: Sequence[Part]
    joined: Sequence[int]

    def parts_of(self, row: int) -> list[Part]:
        return [part for part in self.parts if part.row == row]

    @cached_property
    def kept_counts(self) -> np.ndarray:
        """int32 [rows]: tokens kept of each row."""
        return self._counts(lambda part: part.kept)

    @cached_property
    def kept_XR(self) -> np.ndarray | None:
        """int32 [rows, kept]: the tokens of the step to keep, filled up with 0; None is all."""
        if all(part.sample.positions is None for part in self.parts):
            return None
        size = next(size for size in self.shape.kept_sizes if size >= self.kept_counts.max())
        return self._rows(lambda part: part.offsets(part.sample.kept_positions, part.kept), size)

    def answers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The log-probabilities that are wanted: int32 [rows, tokens] tokens of the step and what should follow each,
        and [rows] how many."""

        def following(part: Part) -> np.ndarray:
            return part.sample.token_ids[part.sample.answer_positions[part.answered]]

        before = self._rows(
            lambda part: part.offsets(part.sample.answer_positions, part.answered) - 1, self.shape.tokens
        )
        return before, self._rows(following, self.shape.tokens), self._counts(lambda part: part.answered)

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and sizes of the blocks that this step completes, int32 [times, rows, shape.blocks], in order; times
        is 1 but for very short samples."""
        found = [
            [block for part in self.parts_of(row) for block in part.blocks()]
            for row in range(self.shape.rows)
        ]
        times = max(1, -(-max(map(len, found)) // self.shape.blocks))
        table = np.zeros((2, self.shape.rows, times * self.shape.blocks), np.int32)
        for row, blocks in enumerate(found):
            table[:, row, : len(blocks)] = np.array(blocks, np.int32).reshape(-1, 2).T
        starts, sizes = np.moveaxis(table.reshape(2, self.shape.rows, times, -1), 2, 1)
        return starts, sizes

    def _counts(self, of_part: Callable[[Part], range]) -> np.ndarray:
        counts = np.zeros(self.shape.rows, np.int32)
        for part in self.parts:
            counts[part.row] += len(of_part(part))
        return counts

    def _rows(self, of_part: Callable[[Part], np.ndarray], width: int) -> np.ndarray:
        """What each part gives, one behind the other in its row."""
        filled, ends = np.zeros((self.shape.rows, width), np.int32), [0] * self.shape.rows
        for part in self.parts:
            values, start = of_part(part), ends[part.row]
            ends[part.row] = start + len(values)
            filled[part.row, start : ends[part.row]] = values
        return filled


@dataclass
class _Row:
    """A device's samples that are not yet in a step. done: tokens of the first one that are; waiting: those that are
    not, of all."""

    number: int
    shape: StepShape
    samples: deque[TokenizedSample] = field(default_factory=deque)
    done: int = 0
    waiting: int = 0

    def add(self, sample: TokenizedSample) -> None:
        self.samples.append(sample)
        self.waiting += self._length(sample)

    def _length(self, sample: TokenizedSample) -> int:
        """With what stands empty before the next sample."""
        return _up(len(sample.token_ids), self.shape.page)

    def take(self, tokens_T: np.ndarray, positions_T: np.ndarray) -> Iterator[Part]:
        """Fills the arrays with the next tokens, as far as there are any, and yields what belongs to which sample."""
        offset, before = 0, None
        while self.samples and offset < len(tokens_T):
            sample, start = self.samples[0], self.done
            count = min(self._length(sample) - start, len(tokens_T) - offset)
            positions_T[offset : offset + count] = np.arange(start, start + count)
            stop = min(start + count, len(sample.token_ids))
            if start < stop:
                tokens_T[offset : offset + stop - start] = sample.token_ids[start:stop]
                given = (sample, offset, start, stop)
                before = before.after(*given) if before else Part(sample, self.number, offset, start, stop)
                yield before
            offset += count
            self._pass(count)
        rest = len(tokens_T) - offset
        positions_T[offset:] = np.arange(rest) % self.shape.positions

    def _pass(self, count: int) -> None:
        self.done += count
        self.waiting -= count
        if self.done == self._length(self.samples[0]):
            self.samples.popleft()
            self.done = 0


def lay_into_steps(samples: Iterable[TokenizedSample], shape: StepShape) -> Iterator[Step]:
    """Steps of `shape`; each sample goes to the row with the fewest tokens waiting.

    Holds, beside a step, at most one sample a row more than the step takes.
    """
    rows = [_Row(number, shape) for number in range(shape.rows)]
    joined: list[int] = []
    for sample in samples:
        min(rows, key=lambda row: row.waiting).add(sample)
        joined.append(sample.sample_idx)
        while min(row.waiting for row in rows) >= shape.tokens:
            yield _take(rows, shape, joined)
            joined = []
    while any(row.waiting for row in rows):
        yield _take(rows, shape, joined)
        joined = []


def _take(rows: Sequence[_Row], shape: StepShape, joined: Sequence[int]) -> Step:
    """The next step, taken off the rows."""
    tokens_XT, positions_XT = (np.full((len(rows), shape.tokens), _NO_TOKEN, np.int32) for _ in range(2))
    parts = [
        part
        for row, tokens_T, positions_T in zip(rows, tokens_XT, positions_XT, strict=True)
        for part in row.take(tokens_T, positions_T)
    ]
    return Step(shape, tokens_XT, positions_XT, parts, joined)
