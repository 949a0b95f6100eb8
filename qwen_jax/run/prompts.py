"""From stream lines to the prompts of a run."""

import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

from qwen_jax.data.arc import BadRecord, Task, Text
from qwen_jax.data.batching import window_start
from qwen_jax.data.prompts import PromptEncoder, SkippedSample, TokenizedSample
from qwen_jax.data.selection import TokenSelection
from qwen_jax.data.streams import StreamSummary, read_stream
from qwen_jax.errors import BadDataError
from qwen_jax.run.settings import Settings

log = logging.getLogger(__name__)


class PromptMaker:
    """One record of a stream -> its prompt, tokenised, with the rows to keep, as the settings say."""

    def __init__(self, settings: Settings, tokenizer: Any, stream_sha256: str):
        self._encoder = PromptEncoder(
            tokenizer,
            prompt_format=settings.prompt_format,
            chat_template=settings.chat_template,
            max_seq_length=settings.max_seq_length,
            overlong=settings.overlong,
            include_answer=settings.include_answer,
        )
        self._selection = TokenSelection(
            settings.keep_tokens,
            skip_first=settings.skip_first,
            special_ids=tokenizer.all_special_ids if settings.skip_special_tokens else (),
            stream_sha256=stream_sha256,
        )

    def __call__(self, sample_idx: int, record: Task | Text | BadRecord) -> TokenizedSample | SkippedSample:
        if isinstance(record, BadRecord):
            return SkippedSample(sample_idx, "", str(record), 0, bad_record=True)
        encoded = self._encoder.encode(sample_idx, record)
        return self._selection.apply(encoded) if isinstance(encoded, TokenizedSample) else encoded


class BadRecordLimit:
    """Counts bad records up to --max_bad_records."""

    def __init__(self, settings: Settings, counted: int = 0):
        self._settings = settings
        self._counted = counted

    def count(self, sample: SkippedSample) -> None:
        """Raises BadDataError for one too many."""
        self._counted += sample.bad_record
        if self._counted > self._settings.max_bad_records:
            raise BadDataError(
                f"{_where(self._settings, sample)}: {sample.reason}; that is bad record number {self._counted}, more "
                f"than --max_bad_records {self._settings.max_bad_records}; mend the stream or raise the limit"
            )


def _where(settings: Settings, sample: SkippedSample) -> str:
    """The stream's file and line, as people count."""
    return f"{settings.dataset_path}, line {sample.sample_idx + 1}"


class SampleReader:
    """Tokenises the stream for a run that writes from sample `first` on; keeps what it skips.

    It starts at the window that holds `first`, so that the windows are those of an uninterrupted run.
    """

    def __init__(
        self,
        settings: Settings,
        make_prompt: PromptMaker,
        first: int,
        bad_before: int,
        stream: StreamSummary | None = None,
    ):
        """bad_before: the bad records before `first`, which count towards --max_bad_records too. stream: as the file
        was summed up; ConfigError where it is another by now."""
        self._stream = stream
        self._settings = settings
        self._make_prompt = make_prompt
        self._first = first
        self._bad = BadRecordLimit(settings, bad_before)
        self._skipped: deque[SkippedSample] = deque()

    def __iter__(self) -> Iterator[TokenizedSample]:
        """Yields samples in order; raises BadDataError past --max_bad_records."""
        for sample_idx, record in read_stream(
            self._settings.dataset_path, window_start(self._first), self._stream
        ):
            if self._settings.max_samples is not None and sample_idx >= self._settings.max_samples:
                return
            result = self._make_prompt(sample_idx, record)
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

    def _skip(self, sample: SkippedSample) -> None:
        log.warning("%s: skipped: %s", _where(self._settings, sample), sample.reason)
        self._skipped.append(sample)
        self._bad.count(sample)
