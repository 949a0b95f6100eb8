"""Samples -> batches of few shapes with little padding, so that a resumed run makes the same batches again.

The stream is read in windows: runs of lines that never cross a multiple of WINDOW_LINES and never hold
more tokens than the look-ahead allows. Each window is sorted by length and cut into batches on its own,
so a sample's batch shape, and with it its bits, depends on the stream and the settings alone, and a
resumed run needs to go back no further than the start of one window.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qwen_jax.data.prompts import TokenizedSample

WINDOW_LINES = 256
_LENGTH_STEP = 64
_MAX_LENGTHS = 16
# What one more step costs on its own, in positions a device could have computed instead.
_STEP_OVERHEAD = 64
# Any token id does: a padded position is never read, and the causal mask hides it from the others.
_PAD_ID = 0


@dataclass(frozen=True)
class BatchShapes:
    """The few [rows, length] shapes a run compiles: at most three for each of at most 16 lengths.

    max_seq_length: tokens of the longest sample. rows_per_device: rows a device takes at that length;
    shorter batches take more, so that a full step has near constant tokens. devices: rows are a multiple
    of it.
    """

    max_seq_length: int
    rows_per_device: int
    devices: int = 1

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The padded lengths, evenly spaced up to max_seq_length."""
        step = _LENGTH_STEP
        while step * _MAX_LENGTHS < self.max_seq_length:
            step += _LENGTH_STEP
        return (*range(step, self.max_seq_length, step), self.max_seq_length)

    @property
    def tokens_per_step(self) -> int:
        """The most positions that one step computes, over all devices."""
        return self.rows_per_device * self.max_seq_length * self.devices

    def length_for(self, n_tokens: int) -> int:
        """The smallest padded length that holds `n_tokens`."""
        return next(length for length in self.lengths if length >= n_tokens)

    def row_counts(self, length: int) -> tuple[int, ...]:
        """Rows that a batch of this length may have: one or two a device, or as many as fill a step."""
        full = self.rows_per_device * self.max_seq_length // length
        return tuple(rows * self.devices for rows in sorted({1, min(2, full), full}))

    def cost(self, rows: int, length: int) -> int:
        """Positions that a batch computes, its fixed cost included."""
        return rows * length + _STEP_OVERHEAD * self.devices


@dataclass(frozen=True)
class Batch:
    """token_ids: int32 [rows, length], padded on the right; row i is samples[i], further rows are dummies."""

    token_ids: np.ndarray
    samples: tuple[TokenizedSample, ...]

    @property
    def counts(self) -> np.ndarray:
        """int32 [rows]: the tokens kept of each row, 0 for dummies."""
        counts = np.zeros(len(self.token_ids), np.int32)
        counts[: len(self.samples)] = [sample.n_kept for sample in self.samples]
        return counts

    @property
    def positions(self) -> np.ndarray | None:
        """int32 [rows, kept]: the positions to keep; None is all. kept: one of a few sizes, so as to compile few."""
        if all(sample.positions is None for sample in self.samples):
            return None
        length = self.token_ids.shape[1]
        most = max(sample.n_kept for sample in self.samples)
        halves = next(n for n in range(length.bit_length(), -1, -1) if -(-length >> n) >= most)
        return self._rows((sample.positions for sample in self.samples), -(-length >> halves))

    @property
    def answer_positions(self) -> np.ndarray | None:
        """int32 [rows, answers]: where answers' tokens stand, answers a power of two; None if there are none."""
        wanted = [sample.answer_positions for sample in self.samples]
        most = max(map(len, wanted))
        return self._rows(wanted, 1 << (most - 1).bit_length()) if most else None

    def _rows(self, values: Iterable[np.ndarray], width: int) -> np.ndarray:
        """Filled up with 1, which is a position that every row has."""
        rows = np.ones((len(self.token_ids), width), np.int32)
        for row, value in zip(rows, values, strict=False):
            row[: len(value)] = value
        return rows


def windows(samples: Iterable[TokenizedSample], max_tokens: int) -> Iterator[list[TokenizedSample]]:
    """Cuts samples (ascending sample_idx) into windows of at most `max_tokens` tokens (or one sample)."""
    window: list[TokenizedSample] = []
    tokens = 0
    for sample in samples:
        n_tokens = len(sample.token_ids)
        crosses = window and sample.sample_idx // WINDOW_LINES != window[0].sample_idx // WINDOW_LINES
        if window and (crosses or tokens + n_tokens > max_tokens):
            yield window
            window, tokens = [], 0
        window.append(sample)
        tokens += n_tokens
    if window:
        yield window


def window_start(sample_idx: int) -> int:
    """The first line a run must read again, to make the same windows from `sample_idx` on."""
    return sample_idx - sample_idx % WINDOW_LINES


def plan_batches(window: Sequence[TokenizedSample], shapes: BatchShapes) -> list[Batch]:
    """Cuts a window, longest samples first, into the cheapest batches; the earliest samples' come first.

    The best cut of the first n samples follows from the best cuts of fewer, so the search is exact.
    """
    by_length = sorted(window, key=lambda sample: (-len(sample.token_ids), sample.sample_idx))
    total = len(by_length)
    cheapest: list[float] = [0, *[math.inf] * total]
    last_batch: list[tuple[int, int, int]] = [(0, 0, 0)] * (total + 1)
    for start in range(total):
        length = shapes.length_for(len(by_length[start].token_ids))
        for rows in shapes.row_counts(length):
            stop = min(start + rows, total)
            cost = cheapest[start] + shapes.cost(rows, length)
            if cost < cheapest[stop]:
                cheapest[stop], last_batch[stop] = cost, (start, rows, length)
    batches = []
    stop = total
    while stop:
        start, rows, length = last_batch[stop]
        batches.append(_fill(by_length[start:stop], rows, length))
        stop = start
    return sorted(batches, key=lambda batch: min(sample.sample_idx for sample in batch.samples))


def _fill(samples: Sequence[TokenizedSample], rows: int, length: int) -> Batch:
    token_ids = np.full((rows, length), _PAD_ID, np.int32)
    for row, sample in zip(token_ids, samples, strict=False):
        row[: len(sample.token_ids)] = sample.token_ids
    return Batch(token_ids, tuple(samples))
