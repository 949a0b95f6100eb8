"""From prompts to filled shards: generators that each do one step, joined in worker.py."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qwen_jax.data.batching import Batch, BatchShapes, plan_batches
from qwen_jax.data.prompts import SkippedSample, TokenizedSample
from qwen_jax.errors import ConfigError
from qwen_jax.model.capture import Captured, Tap
from qwen_jax.run.prompts import SampleReader
from qwen_jax.shards import EMBEDDING, Sample
from qwen_jax.shards.statistics import KindStats, Stats

log = logging.getLogger(__name__)

# Steps that the device may be ahead of the host: one computing while one is copied.
STEPS_IN_FLIGHT = 2
# The part of a batch that must be wanted tokens for its memory to be kept instead of copied.
MIN_REAL_SHARE = 0.8


class CaptureStep(Protocol):
    """What the pipeline needs of model.capture.Capture."""

    def __call__(
        self,
        tokens_BT: np.ndarray,
        counts_B: np.ndarray,
        positions_BR: np.ndarray | None,
        answers_BA: np.ndarray | None,
    ) -> Captured: ...


@dataclass(frozen=True)
class SampleTap:
    """What one tap saw of a sample; see model.capture.Tap. C layers, 1 for the embedding; R kept rows."""

    activations_CRD: np.ndarray
    norms_CR: np.ndarray
    mean_CD: np.ndarray
    squares_CD: np.ndarray
    max_abs_CD: np.ndarray


@dataclass(frozen=True)
class CapturedSample:
    """A sample off the device, padding removed. taps: by name, the main one first.

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
        return sum(tap.activations_CRD.nbytes for tap in self.taps.values())

    def for_shard(self) -> Sample:
        source = self.tokenized
        arrays = {name: tap.activations_CRD for name, tap in self.taps.items()}
        embedding = arrays.pop(EMBEDDING, None)
        return Sample(
            source.sample_idx,
            next(iter(arrays.values())),
            source.kept(source.token_ids),
            source.text_preview,
            source.task_id,
            self._extras(),
            arrays if len(arrays) > 1 else {},
            None if embedding is None else embedding[0],
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


@dataclass(frozen=True)
class FilledShard:
    """A shard's samples in order, and the lines skipped since the shard before."""

    samples: Sequence[CapturedSample]
    skipped: Sequence[SkippedSample]

    def stats(self, layers: Sequence[int]) -> Stats:
        """layers: those of the shard."""

        def of(name: str) -> KindStats:
            taps = [sample.taps[name] for sample in self.samples]
            return KindStats.of_samples(
                () if name == EMBEDDING else layers,
                [tap.norms_CR for tap in taps],
                [tap.mean_CD for tap in taps],
                [tap.squares_CD for tap in taps],
                [tap.max_abs_CD for tap in taps],
            )

        return {name: of(name) for name in self.samples[0].taps}


def captured_samples(
    windows: Iterable[list[TokenizedSample]], shapes: BatchShapes, capture: CaptureStep, first: int
) -> Iterator[CapturedSample]:
    """Runs the windows' batches and yields the samples from `first` on, in order, padding removed.

    The device is kept STEPS_IN_FLIGHT batches ahead of the host. Beside those, at most the samples of
    the open windows are held. Raises ConfigError for activations that are not finite.
    """
    expected: deque[int] = deque()
    ready: dict[int, CapturedSample] = {}
    in_flight: deque[tuple[Batch, Captured]] = deque()

    def finish_oldest() -> Iterator[CapturedSample]:
        for sample in unpad(*in_flight.popleft(), first):
            _refuse_non_finite(sample)
            ready[sample.sample_idx] = sample
        while expected and expected[0] in ready:
            yield ready.pop(expected.popleft())

    for window in windows:
        expected.extend(sample.sample_idx for sample in window if sample.sample_idx >= first)
        for batch in plan_batches(window, shapes):
            if all(sample.sample_idx < first for sample in batch.samples):
                continue
            inputs = (batch.token_ids, batch.counts, batch.positions, batch.answer_positions)
            in_flight.append((batch, capture(*inputs)))
            if len(in_flight) > STEPS_IN_FLIGHT:
                yield from finish_oldest()
    while in_flight:
        yield from finish_oldest()


def unpad(batch: Batch, captured: Captured, first: int) -> Iterator[CapturedSample]:
    """Yields the real tokens of each row from sample `first` on.

    As views, since a copy would cost a tenth of the host's time; then the batch lives as long as they do. A
    batch that is less than MIN_REAL_SHARE wanted tokens is copied, so that little else is kept alive.
    """
    taps = {name: Tap(*map(np.asarray, tap)) for name, tap in captured.taps.items()}
    wanted = [(row, sample) for row, sample in enumerate(batch.samples) if sample.sample_idx >= first]
    wanted_rows = sum(sample.n_kept for _, sample in wanted)
    shape = next(iter(taps.values())).norms_CBR.shape
    keep = np.asarray if wanted_rows >= MIN_REAL_SHARE * shape[1] * shape[2] else np.copy
    for row, sample in wanted:
        of_row = {
            name: SampleTap(
                keep(tap.activations_CBRD[:, row, : sample.n_kept]),
                keep(tap.norms_CBR[:, row, : sample.n_kept]),
                np.copy(tap.mean_CBD[:, row]),
                np.copy(tap.squares_CBD[:, row]),
                np.copy(tap.max_abs_CBD[:, row]),
            )
            for name, tap in taps.items()
        }
        answered = len(sample.answer_positions)
        logprobs = np.asarray(captured.answer_logprobs_BA)[row, :answered] if answered else None
        yield CapturedSample(sample, of_row, logprobs)


def _refuse_non_finite(sample: CapturedSample) -> None:
    broken = [name for name, tap in sample.taps.items() if not np.isfinite(tap.norms_CR).all()]
    if not broken:
        return
    dtype = sample.taps[broken[0]].activations_CRD.dtype
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
    filled: list[CapturedSample] = []
    raw_bytes = 0
    for sample in samples:
        filled.append(sample)
        raw_bytes += sample.nbytes
        if raw_bytes >= shard_bytes:
            yield FilledShard(filled, reader.take_skipped(sample.sample_idx))
            filled, raw_bytes = [], 0
    if filled:
        yield FilledShard(filled, reader.take_skipped(filled[-1].sample_idx))
