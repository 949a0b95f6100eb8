"""From stream lines to finished shards: generators that each do one step, joined in worker.py."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from qwen_jax.data.arc import BadRecord, Task, Text
from qwen_jax.data.batching import Batch, BatchShapes, plan_batches, window_start
from qwen_jax.data.prompts import PromptEncoder, SkippedSample, TokenizedSample
from qwen_jax.data.streams import read_stream
from qwen_jax.errors import BadDataError, ConfigError
from qwen_jax.model.capture import Captured
from qwen_jax.run.settings import Settings
from qwen_jax.shards import Sample

log = logging.getLogger(__name__)

T = TypeVar("T")

# Steps that the device may be ahead of the host: one computing while one is copied.
STEPS_IN_FLIGHT = 2
# The part of a batch that must be wanted tokens for its memory to be kept instead of copied.
MIN_REAL_SHARE = 0.8


class CaptureStep(Protocol):
    """What the pipeline needs of model.capture.Capture."""

    def __call__(self, tokens_BT: np.ndarray) -> Captured: ...


@dataclass(frozen=True)
class CapturedSample:
    """A sample off the device, padding removed. norms_CT: float32, of the stored activations."""

    tokenized: TokenizedSample
    activations_CTD: np.ndarray
    norms_CT: np.ndarray

    @property
    def sample_idx(self) -> int:
        return self.tokenized.sample_idx

    def for_shard(self) -> Sample:
        source = self.tokenized
        return Sample(
            source.sample_idx, self.activations_CTD, source.token_ids, source.text_preview, source.task_id
        )


@dataclass(frozen=True)
class FilledShard:
    """A shard's samples in order, and the lines skipped since the shard before."""

    samples: Sequence[CapturedSample]
    skipped: Sequence[SkippedSample]


class SampleReader:
    """Tokenises the stream for a run that writes from sample `first` on; keeps what it skips.

    It starts at the window that holds `first`, so that the windows are those of an uninterrupted run.
    """

    def __init__(self, settings: Settings, encoder: PromptEncoder, first: int, bad_before: int):
        """bad_before: the bad records before `first`, which count towards --max_bad_records too."""
        self._settings = settings
        self._encoder = encoder
        self._first = first
        self._bad = bad_before
        self._skipped: deque[SkippedSample] = deque()

    def __iter__(self) -> Iterator[TokenizedSample]:
        """Yields samples in order; raises BadDataError past --max_bad_records."""
        for sample_idx, record in read_stream(self._settings.dataset_path, window_start(self._first)):
            if self._settings.max_samples is not None and sample_idx >= self._settings.max_samples:
                return
            result = self._encode(sample_idx, record)
            if isinstance(result, TokenizedSample):
                yield result
            elif sample_idx >= self._first:
                self._skip(result)

    def take_skipped(self, last: int | None = None) -> list[SkippedSample]:
        """Hands over, once, the skipped samples up to sample `last` (all where None)."""
        taken = []
        while self._skipped and (last is None or self._skipped[0].sample_idx <= last):
            taken.append(self._skipped.popleft())
        return taken

    def _encode(self, sample_idx: int, record: Task | Text | BadRecord) -> TokenizedSample | SkippedSample:
        if isinstance(record, BadRecord):
            return SkippedSample(sample_idx, "", str(record), 0, bad_record=True)
        return self._encoder.encode(sample_idx, record)

    def _skip(self, sample: SkippedSample) -> None:
        where = f"{self._settings.dataset_path}, line {sample.sample_idx + 1}"
        log.warning("%s: skipped: %s", where, sample.reason)
        self._skipped.append(sample)
        self._bad += sample.bad_record
        if self._bad > self._settings.max_bad_records:
            raise BadDataError(
                f"{where}: {sample.reason}; that is bad record number {self._bad}, more than "
                f"--max_bad_records {self._settings.max_bad_records}; mend the stream or raise the limit"
            )


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
            in_flight.append((batch, capture(batch.token_ids)))
            if len(in_flight) > STEPS_IN_FLIGHT:
                yield from finish_oldest()
    while in_flight:
        yield from finish_oldest()


def unpad(batch: Batch, captured: Captured, first: int) -> Iterator[CapturedSample]:
    """Yields the real tokens of each row from sample `first` on.

    As views, since a copy would cost a tenth of the host's time; then the batch lives as long as they do. A
    batch that is less than MIN_REAL_SHARE wanted tokens is copied, so that little else is kept alive.
    """
    activations_CBTD, norms_CBT = map(np.asarray, captured)
    wanted = [(row, sample) for row, sample in enumerate(batch.samples) if sample.sample_idx >= first]
    wanted_tokens = sum(len(sample.token_ids) for _, sample in wanted)
    keep = np.asarray if wanted_tokens >= MIN_REAL_SHARE * batch.token_ids.size else np.copy
    for row, sample in wanted:
        n_tokens = len(sample.token_ids)
        yield CapturedSample(
            sample, keep(activations_CBTD[:, row, :n_tokens]), keep(norms_CBT[:, row, :n_tokens])
        )


def _refuse_non_finite(sample: CapturedSample) -> None:
    if np.isfinite(sample.norms_CT).all():
        return
    advice = "check the checkpoint's weights"
    if sample.activations_CTD.dtype == np.float16:
        advice = "float16 ends at 65504: use --activation_dtype bfloat16 or float32"
    raise ConfigError(
        f"sample {sample.sample_idx} ({sample.tokenized.task_id}) has activations that are infinite or not "
        f"numbers in {sample.activations_CTD.dtype}; {advice}"
    )


def filled_shards(
    samples: Iterable[CapturedSample], shard_bytes: int, reader: SampleReader
) -> Iterator[FilledShard]:
    """Groups samples into shards; a shard closes when its raw activation bytes reach `shard_bytes`."""
    filled: list[CapturedSample] = []
    raw_bytes = 0
    for sample in samples:
        filled.append(sample)
        raw_bytes += sample.activations_CTD.nbytes
        if raw_bytes >= shard_bytes:
            yield FilledShard(filled, reader.take_skipped(sample.sample_idx))
            filled, raw_bytes = [], 0
    if filled:
        yield FilledShard(filled, reader.take_skipped(filled[-1].sample_idx))


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yields `items` from a thread that runs at most `depth` items ahead; its errors are raised here."""
    ahead: queue.Queue = queue.Queue(depth)
    abandoned = threading.Event()
    end = object()

    def offer(item: object) -> bool:
        while not abandoned.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer((item, None)):
                    return
            offer((end, None))
        except BaseException as error:  # noqa: BLE001  (it is raised in the consumer's thread)
            offer((end, error))

    thread = threading.Thread(target=produce, name="read", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ahead.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        abandoned.set()
        thread.join()
