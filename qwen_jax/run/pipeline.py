"""From stream lines to finished shards: generators that each do one step, joined in worker.py."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np

from qwen_jax.data.arc import BadRecord, Task, Text
from qwen_jax.data.batching import Batch, BatchShapes, plan_batches, window_start
from qwen_jax.data.prompts import PromptEncoder, SkippedSample, TokenizedSample
from qwen_jax.data.streams import read_stream
from qwen_jax.errors import BadDataError, ConfigError
from qwen_jax.run.commit import FilledShard
from qwen_jax.run.settings import Settings
from qwen_jax.shards import Sample

log = logging.getLogger(__name__)

T = TypeVar("T")

# Steps that the device may be ahead of the host: one computing while one is copied.
STEPS_IN_FLIGHT = 2


class CaptureStep(Protocol):
    """What the pipeline needs of model.capture.Capture."""

    def __call__(self, tokens_BT: np.ndarray) -> "np.ndarray": ...


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
) -> Iterator[tuple[TokenizedSample, Sample]]:
    """Runs the windows' batches and yields the samples from `first` on, in order, padding removed.

    The device is kept STEPS_IN_FLIGHT batches ahead of the host. Beside those, at most the samples of
    the open windows are held.
    """
    expected: deque[TokenizedSample] = deque()
    ready: dict[int, Sample] = {}
    in_flight: deque[tuple[Batch, object]] = deque()

    def finish_oldest() -> Iterator[tuple[TokenizedSample, Sample]]:
        batch, captured = in_flight.popleft()
        ready.update((sample.sample_idx, sample) for sample in unpad(batch, np.asarray(captured), first))
        while expected and expected[0].sample_idx in ready:
            tokenized = expected.popleft()
            yield tokenized, ready.pop(tokenized.sample_idx)

    for window in windows:
        expected.extend(sample for sample in window if sample.sample_idx >= first)
        for batch in plan_batches(window, shapes):
            if all(sample.sample_idx < first for sample in batch.samples):
                continue
            in_flight.append((batch, capture(batch.token_ids)))
            if len(in_flight) > STEPS_IN_FLIGHT:
                yield from finish_oldest()
    while in_flight:
        yield from finish_oldest()


def unpad(batch: Batch, captured_CBTD: np.ndarray, first: int) -> Iterator[Sample]:
    """Copies each wanted row's real tokens out of a batch, so that the batch itself can be freed."""
    for row, tokenized in enumerate(batch.samples):
        if tokenized.sample_idx >= first:
            activations_CTD = captured_CBTD[:, row, : len(tokenized.token_ids)].copy()
            _refuse_overflow(activations_CTD, tokenized)
            yield Sample(
                tokenized.sample_idx,
                activations_CTD,
                tokenized.token_ids,
                tokenized.text_preview,
                tokenized.task_id,
            )


def _refuse_overflow(activations_CTD: np.ndarray, sample: TokenizedSample) -> None:
    if activations_CTD.dtype == np.float16 and not np.isfinite(activations_CTD).all():
        raise ConfigError(
            f"sample {sample.sample_idx} ({sample.task_id}) has activations beyond float16's range of 65504; "
            "use --activation_dtype bfloat16 or float32"
        )


def filled_shards(
    samples: Iterable[tuple[TokenizedSample, Sample]], shard_bytes: int, reader: SampleReader
) -> Iterator[FilledShard]:
    """Groups samples into shards; a shard closes when its raw activation bytes reach `shard_bytes`."""
    tokenized: list[TokenizedSample] = []
    filled: list[Sample] = []
    raw_bytes = 0
    for source, sample in samples:
        tokenized.append(source)
        filled.append(sample)
        raw_bytes += sample.activations.nbytes
        if raw_bytes >= shard_bytes:
            yield FilledShard(filled, tokenized, reader.take_skipped(sample.sample_idx))
            tokenized, filled, raw_bytes = [], [], 0
    if filled:
        yield FilledShard(filled, tokenized, reader.take_skipped(filled[-1].sample_idx))


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
