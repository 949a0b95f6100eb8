"""From stream lines to the prompts of a run."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from itertools import islice
from typing import Any, Protocol

from qwen_jax.data.arc import BadRecord, Grid, Task, Text
from qwen_jax.data.prompts import PromptEncoder, SkippedSample, TokenizedSample
from qwen_jax.data.selection import TokenSelection
from qwen_jax.data.streams import StreamSummary, read_stream
from qwen_jax.errors import BadDataError
from qwen_jax.settings import Settings

log = logging.getLogger(__name__)


class Rollouts(Protocol):
    """run.rollout.RolloutMaker, or answers that are stored already."""

    def __call__(
        self, encoded: Iterable[TokenizedSample | SkippedSample], expected: MutableMapping[int, Grid]
    ) -> Iterator[TokenizedSample | SkippedSample]:
        """expected: by sample_idx the outputs that solve tasks, of which each is taken out as it is looked at."""
        ...


class PromptMaker:
    """Records of a stream -> their prompts, tokenised, with the rows to keep, as the settings say."""

    def __init__(
        self, settings: Settings, tokenizer: Any, stream_sha256: str, rollout: Rollouts | None = None
    ):
        """rollout: puts answers behind prompts, as --rollout asks for."""
        self._rollout = rollout
        self._encoder = PromptEncoder(
            tokenizer,
            prompt_format=settings.prompt_format,
            chat_template=settings.chat_template,
            max_seq_length=settings.max_seq_length - settings.rollout,
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
        """`many` of one record."""
        (made,) = self.many([(sample_idx, record)])
        return made

    def many(
        self, records: Iterable[tuple[int, Task | Text | BadRecord]]
    ) -> Iterator[TokenizedSample | SkippedSample]:
        """In order, in the time and memory of PromptEncoder.encode_many."""
        for encoded in self._encoded(records):
            yield self._selection.apply(encoded) if isinstance(encoded, TokenizedSample) else encoded

    def _encoded(
        self, records: Iterable[tuple[int, Task | Text | BadRecord]]
    ) -> Iterator[TokenizedSample | SkippedSample]:
        if self._rollout is None:
            return self._encoder.encode_many(records)
        expected: dict[int, Grid] = {}

        def seen() -> Iterator[tuple[int, Task | Text | BadRecord]]:
            for sample_idx, record in records:
                if isinstance(record, Task) and "output" in record.test[0]:
                    expected[sample_idx] = record.test[0]["output"]
                yield sample_idx, record

        return self._rollout(self._encoder.encode_many(seen()), expected)


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
    return f"{settings.stream_path}, line {sample.sample_idx + 1}"


class SampleReader:
    """Tokenises the stream for a run that writes from sample `first` on; keeps what it skips."""

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
        for result in self._make_prompt.many(self._records()):
            if isinstance(result, TokenizedSample):
                yield result
            else:
                self._skip(result)

    def _records(self) -> Iterator[tuple[int, Task | Text | BadRecord]]:
        """Those from `first` on, up to --max_samples; reads no line more."""
        records = read_stream(self._settings.stream_path, self._first, self._stream)
        most = self._settings.max_samples
        return records if most is None else islice(records, max(most - self._first, 0))

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
