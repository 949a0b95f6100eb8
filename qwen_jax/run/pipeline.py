"""From prompts to filled shards: generators that each do one step, joined in worker.py."""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from qwen_jax.data.prompts import SkippedSample, TokenizedSample
from qwen_jax.data.steps import Part, Step
from qwen_jax.errors import ConfigError
from qwen_jax.model.capture import RowResult, TapRows
from qwen_jax.run.sample_reader import SampleReader
from qwen_jax.shards import EMBEDDING, QuantisedRows, Rows, Sample
from qwen_jax.shards.statistics import RowErrors, RowSums, Stats, StatsPool

# Steps that the device may be ahead of the host: one computing while one is copied.
STEPS_IN_FLIGHT = 2
# The part of a step's kept memory that must be wanted for it to be kept instead of copied.
MIN_REAL_SHARE = 0.8
_NOTHING = np.zeros((0, 0))
NO_SUMS = RowSums(_NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING)
"""Of a sample whose sums are in a pool."""


class Pending(Protocol):
    """A step under way (model.capture.Captured)."""

    def rows(self) -> list[RowResult]: ...


class CaptureStep(Protocol):
    """What the pipeline needs of model.capture.Capture."""

    def __call__(self, step: Step) -> Pending: ...


@dataclass(frozen=True)
class SampleTap:
    """What one tap saw of a sample. pieces: [C, n, D] arrays, its kept rows one behind the other. beside: where those
    are codes, the rest of model.quantise.Quantised for all rows."""

    pieces: Sequence[np.ndarray]
    sums: RowSums
    beside: Sequence[np.ndarray] = ()

    def layers(self) -> Sequence[Rows | QuantisedRows]:
        rows = [Rows(of_layer) for of_layer in zip(*self.pieces, strict=True)]
        if not self.beside:
            return rows
        return [QuantisedRows(codes, *of_layer) for codes, *of_layer in zip(rows, *self.beside, strict=True)]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (*self.pieces, *self.beside))

    @property
    def dtype(self) -> np.dtype:
        """That the values had on the device."""
        return (*self.pieces[:1], *self.beside)[-1].dtype


@dataclass(frozen=True)
class CapturedSample:
    """A sample off the device. taps: by name, the main one first.

    answer_logprobs: float32, of the answer's tokens, where they were asked for.
    """

    tokenized: TokenizedSample
    taps: Mapping[str, SampleTap]
    answer_logprobs: np.ndarray | None = None

    @property
    def sample_idx(self) -> int:
        return self.tokenized.sample_idx

    @property
    def nbytes(self) -> int:
        """Raw bytes of its activations."""
        return sum(tap.nbytes for tap in self.taps.values())

    def for_shard(self) -> Sample:
        source = self.tokenized
        kinds = {name: tap.layers() for name, tap in self.taps.items()}
        embedding = kinds.pop(EMBEDDING, None)
        return Sample(
            source.sample_idx,
            next(iter(kinds.values())),
            source.kept(source.token_ids),
            source.text_preview,
            source.task_id,
            self._extras(),
            kinds if len(kinds) > 1 else {},
            None if embedding is None else embedding[0],
            source.notes,
        )

    def _extras(self) -> dict[str, np.ndarray]:
        source = self.tokenized
        extras = {"token_roles": source.kept(source.roles)}
        if source.cells is not None:
            extras["token_cells"] = source.kept(source.cells)
        if source.positions is not None:
            extras["token_positions"] = source.positions
        if self.answer_logprobs is not None:
            extras["answer_logprobs"] = self.answer_logprobs
            extras["answer_token_ids"] = source.token_ids[source.answer_positions]
            extras["answer_positions"] = source.answer_positions
        return extras


@dataclass
class FilledShard:
    """A shard's samples in order, and the lines skipped since the shard before. nbytes: raw, of its activations."""

    samples: list[CapturedSample] = field(default_factory=list)
    skipped: Sequence[SkippedSample] = ()
    nbytes: int = 0
    pools: dict[str, StatsPool] = field(default_factory=lambda: defaultdict(StatsPool))

    def add(self, sample: CapturedSample) -> None:
        """The next sample; its sums go into the pools."""
        for name, tap in sample.taps.items():
            self.pools[name].add(tap.sums)
        taps = {name: replace(tap, sums=NO_SUMS) for name, tap in sample.taps.items()}
        self.samples.append(replace(sample, taps=taps))
        self.nbytes += sample.nbytes

    def stats(self, layers: Sequence[int]) -> Stats:
        """layers: those of the shard."""
        return {name: pool.stats(() if name == EMBEDDING else layers) for name, pool in self.pools.items()}


@dataclass
class _Pieces:
    """What the steps have given so far of a sample: of each tap what TapRows holds, part by part."""

    taps: dict[str, list[TapRows]] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    log_probs: list[np.ndarray] = field(default_factory=list)

    def add(self, part: Part, result: RowResult, row_kept: int) -> None:
        """row_kept: tokens kept of the part's row. What is kept is a view, since a copy would cost a tenth of the
        host's time; then the step's memory lives as long, so that of which little is wanted is copied."""
        self.counts += [size for _, size in part.blocks()]
        for name, tap in result.taps.items():
            wanted = row_kept >= MIN_REAL_SHARE * tap.stored[0].shape[1]
            rows_CRD, *beside = (array[:, part.kept_rows] for array in tap.stored)
            self.taps.setdefault(name, []).append(
                TapRows(
                    (rows_CRD if wanted else np.copy(rows_CRD), *map(np.copy, beside)),
                    tuple(np.copy(sums_CR[:, part.kept_rows]) for sums_CR in tap.of_rows),
                    tuple(np.copy(sums_CED[:, part.block_rows]) for sums_CED in tap.of_blocks),
                )
            )
        if result.log_probs_T is not None:
            self.log_probs.append(np.copy(result.log_probs_T[part.answer_rows]))

    def whole(self, tokenized: TokenizedSample) -> CapturedSample:
        taps = {name: self._tap(parts) for name, parts in self.taps.items()}
        log_probs = np.concatenate(self.log_probs) if len(tokenized.answer_positions) else None
        return CapturedSample(tokenized, taps, log_probs)

    def _tap(self, parts: Sequence[TapRows]) -> SampleTap:
        norms_CR, *losses = _joined([part.of_rows for part in parts])
        mean_CED, squares_CED, max_abs_CED, *largest = _joined([part.of_blocks for part in parts])
        errors = RowErrors(*losses, *largest) if losses else None
        sums = RowSums(norms_CR, np.array(self.counts), mean_CED, squares_CED, max_abs_CED, errors)
        pieces = [part.stored[0] for part in parts if part.stored[0].shape[1]]
        return SampleTap(pieces, sums, _joined([part.stored[1:] for part in parts]))


def _joined(parts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Each of the parts' arrays, [C, n, ...], one behind the other."""
    return [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]


def captured_samples(steps: Iterable[Step], capture: CaptureStep) -> Iterator[CapturedSample]:
    """Runs the steps and yields their samples in order.

    The device is kept STEPS_IN_FLIGHT steps ahead of the host. Beside those, the parts of one sample a row are held,
    and what other rows finish while the next one in order is under way. Raises ConfigError for activations that are
    not finite.
    """
    begun: dict[int, _Pieces] = {}
    ready: dict[int, CapturedSample] = {}
    order: deque[int] = deque()
    in_flight: deque[tuple[Step, Pending]] = deque()

    def finish_oldest() -> Iterator[CapturedSample]:
        step, pending = in_flight.popleft()
        for sample in _finished(step, pending.rows(), begun):
            ready[sample.sample_idx] = sample
        while order and order[0] in ready:
            yield ready.pop(order.popleft())

    for step in steps:
        order.extend(step.joined)
        in_flight.append((step, capture(step)))
        if len(in_flight) > STEPS_IN_FLIGHT:
            yield from finish_oldest()
    while in_flight:
        yield from finish_oldest()


def _finished(step: Step, rows: Sequence[RowResult], begun: dict[int, _Pieces]) -> Iterator[CapturedSample]:
    """Gives every sample its part of the step, and yields those that are then whole."""
    for part in step.parts:
        pieces = begun.setdefault(part.sample.sample_idx, _Pieces())
        pieces.add(part, rows[part.row], step.kept_counts[part.row])
        if part.is_last:
            sample = begun.pop(part.sample.sample_idx).whole(part.sample)
            _refuse_non_finite(sample)
            yield sample


def _refuse_non_finite(sample: CapturedSample) -> None:
    broken = [name for name, tap in sample.taps.items() if not np.isfinite(tap.sums.norms_CR).all()]
    if not broken:
        return
    dtype = sample.taps[broken[0]].dtype
    advice = "check the checkpoint's weights"
    if dtype == np.float16:
        advice = "float16 ends at 65504: use --activation_dtype bfloat16 or float32"
    raise ConfigError(
        f"sample {sample.sample_idx} ({sample.tokenized.task_id}) has activations ({', '.join(broken)}) that are "
        f"infinite or not numbers in {dtype}; {advice}"
    )


def filled_shards(
    samples: Iterable[CapturedSample], shard_bytes: int, reader: SampleReader
) -> Iterator[FilledShard]:
    """Groups samples into shards; a shard closes when its raw activation bytes reach `shard_bytes`."""
    shard = FilledShard()
    for sample in samples:
        shard.add(sample)
        if shard.nbytes >= shard_bytes:
            shard.skipped = reader.take_skipped(sample.sample_idx)
            yield shard
            shard = FilledShard()
    if shard.samples:
        shard.skipped = reader.take_skipped(shard.samples[-1].sample_idx)
        yield shard
