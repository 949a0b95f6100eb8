"""Task or text -> prompt -> token ids, with over-long prompts handled in the open."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from qwen_jax.data.arc import BadRecord, Task, Text, check_encodable
from qwen_jax.data.layouts import (
    PROMPT_FORMATS,
    Prompt,
    Segment,
    answer_segment,
    place_in_template,
    task_segments,
)
from qwen_jax.errors import ConfigError, UsageError
from qwen_jax.roles import ANSWER, ASSISTANT, SYSTEM, TEMPLATE, TEXT, USER

OVERLONG_POLICIES = ("drop_examples", "truncate", "skip")
_PREVIEW_CHARACTERS = 200
_MESSAGE_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}


@dataclass(frozen=True)
class TokenizedSample:
    """A sample ready to run.

    Attributes:
        token_ids: int32 [n_tokens].
        roles: int32 [n_tokens], codes of qwen_jax/roles.py; a token that spans two parts has the first one's.
        cells: int32 [n_tokens, 4]: grid, row, column and colour of the cell that a token is, -1 elsewhere.
            Grid 2k is the input of the task's training example k (from 0), 2k + 1 its output; the test input
            and the answer follow. None for text.
        text_preview: the first 200 characters of the prompt that was tokenised, so without dropped examples.
        truncated: whether tokens were cut off on the right.
        dropped_examples: leading training examples left out to make it fit.
        full_length: tokens before any shortening.
        positions: int32 [n_kept], ascending: the tokens whose activations are kept; None is all of them.
        with_answer: whether the log-probabilities of the tokens of role ANSWER are wanted.
    """

    sample_idx: int
    token_ids: np.ndarray
    roles: np.ndarray
    cells: np.ndarray | None
    text_preview: str
    task_id: str
    truncated: bool
    dropped_examples: int
    full_length: int
    positions: np.ndarray | None = None
    with_answer: bool = False

    @property
    def n_kept(self) -> int:
        return len(self.token_ids) if self.positions is None else len(self.positions)

    def kept(self, values: np.ndarray) -> np.ndarray:
        """The entries of `values`, one a token, that are kept."""
        return values if self.positions is None else values[self.positions]

    @property
    def answer_positions(self) -> np.ndarray:
        """int32: where the answer's tokens stand; none unless they are wanted."""
        # The first token has nothing before it that could foretell it.
        return 1 + np.flatnonzero(self.with_answer & (self.roles[1:] == ANSWER)).astype(np.int32)

    def cut(self, n_tokens: int) -> Self:
        """The first `n_tokens` tokens."""
        return replace(
            self,
            token_ids=self.token_ids[:n_tokens],
            roles=self.roles[:n_tokens],
            cells=None if self.cells is None else self.cells[:n_tokens],
            truncated=True,
        )


@dataclass(frozen=True)
class SkippedSample:
    """A sample that is left out. bad_record: the line itself is faulty, rather than only too long."""

    sample_idx: int
    task_id: str
    reason: str
    full_length: int
    bad_record: bool = False


class PromptEncoder:
    """Turns the records of a stream into token ids of at most `max_seq_length`."""

    def __init__(
        self,
        tokenizer: Any,
        prompt_format: str = "rows",
        chat_template: bool = False,
        max_seq_length: int = 2048,
        overlong: str = "drop_examples",
        include_answer: bool = False,
    ):
        """tokenizer: as load_tokenizer gives it. include_answer: a task's prompt goes on with its first test
        output, where the stream has it. Raises UsageError for names that are in no table."""
        if prompt_format not in PROMPT_FORMATS:
            raise UsageError(f"--prompt_format {prompt_format}: choose from {', '.join(PROMPT_FORMATS)}")
        if overlong not in OVERLONG_POLICIES:
            raise UsageError(f"--overlong {overlong}: choose from {', '.join(OVERLONG_POLICIES)}")
        if chat_template and not tokenizer.chat_template:
            raise ConfigError(
                "--chat_template: this model's tokenizer has no chat template; use an Instruct model, or leave "
                "the flag out"
            )
        self._tokenizer = tokenizer
        self._layout = PROMPT_FORMATS[prompt_format]
        self._chat_template = chat_template
        self._max_seq_length = max_seq_length
        self._overlong = overlong
        self._include_answer = include_answer

    def encode(self, sample_idx: int, record: Task | Text) -> TokenizedSample | SkippedSample:
        """Tokenises one record; what does not fit is shortened or skipped as `overlong` says.

        `drop_examples` leaves out as few leading training examples of a task as make it fit, and cuts text
        on the right; `truncate` cuts everything on the right; `skip` skips. A task whose test input does not
        fit even alone is skipped. No special tokens are added but those of the chat template.
        A record that cannot become tokens at all is skipped as a bad one. Raises ConfigError for chat
        messages where the tokenizer has no chat template.
        """
        try:
            full = self._tokenize(sample_idx, record, 0)
        except BadRecord as bad:
            return SkippedSample(sample_idx, record.task_id, str(bad), 0, True)
        if not full.full_length:
            return SkippedSample(sample_idx, record.task_id, "prompt has no tokens", 0, True)
        if full.full_length <= self._max_seq_length:
            return full
        if self._overlong == "skip":
            return self._too_long(full, "prompt")
        if self._overlong == "drop_examples" and isinstance(record, Task):
            return self._drop_examples(full, record)
        return full.cut(self._max_seq_length)

    def _drop_examples(self, full: TokenizedSample, task: Task) -> TokenizedSample | SkippedSample:
        for dropped in range(1, len(task.train) + 1):
            shorter = self._tokenize(full.sample_idx, task, dropped)
            if len(shorter.token_ids) <= self._max_seq_length:
                return replace(shorter, full_length=full.full_length)
        return self._too_long(full, "test input without any example")

    def _too_long(self, full: TokenizedSample, what: str) -> SkippedSample:
        reason = f"{what} is longer than max_seq_length {self._max_seq_length}"
        return SkippedSample(full.sample_idx, full.task_id, reason, full.full_length)

    def _tokenize(self, sample_idx: int, record: Task | Text, dropped: int) -> TokenizedSample:
        prompt = Prompt(self._segments(record, dropped))
        check_encodable(prompt.text, "prompt")
        encoded = self._tokenizer(
            prompt.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = np.asarray(encoded["input_ids"], np.int32)
        spans = np.asarray(encoded["offset_mapping"], np.int32).reshape(-1, 2)
        return TokenizedSample(
            sample_idx,
            ids,
            prompt.token_roles(spans),
            prompt.token_cells(spans),
            prompt.text[:_PREVIEW_CHARACTERS],
            record.task_id,
            truncated=False,
            dropped_examples=dropped,
            full_length=len(ids),
            with_answer=self._include_answer,
        )

    def _segments(self, record: Task | Text, dropped: int) -> list[Segment]:
        """The prompt's parts, the chat template and the answer included where they are asked for."""
        if isinstance(record, Text) and record.messages is not None:
            return self._in_template(record.messages, [[_message_segment(each)] for each in record.messages])
        if isinstance(record, Text):
            return self._as_user([Segment(TEXT, record.text)])
        segments = self._as_user(task_segments(record, self._layout, dropped))
        answer = answer_segment(record, self._layout) if self._include_answer else None
        return segments if answer is None else [*segments, answer]

    def _as_user(self, segments: list[Segment]) -> list[Segment]:
        """One user message in the chat template if that is asked for, else as it is."""
        return self._in_template([{"role": "user"}], [segments]) if self._chat_template else segments

    def _in_template(self, messages: list[dict[str, str]], contents: list[list[Segment]]) -> list[Segment]:
        def render(texts: list[str]) -> str:
            return self._apply_template(
                [message | {"content": text} for message, text in zip(messages, texts, strict=True)]
            )

        return place_in_template(render, contents)

    def _apply_template(self, messages: list[dict[str, str]]) -> str:
        if not self._tokenizer.chat_template:
            raise ConfigError(
                "the stream has chat messages, but this model's tokenizer has no chat template; use an Instruct "
                "model, or a stream with text"
            )
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise BadRecord(f"the chat template refuses the messages: {error}") from error


def _message_segment(message: dict[str, str]) -> Segment:
    return Segment(_MESSAGE_ROLES.get(message["role"], TEMPLATE), message["content"])


def load_tokenizer(path_or_id: str, revision: str | None = None) -> Any:
    """The model's fast tokenizer, from a local folder or the hub; runs no code of the model's repository.

    Raises ConfigError if there is none.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install PyTorch
    from transformers import AutoTokenizer

    local = Path(path_or_id).is_dir()
    if local and not (Path(path_or_id) / "tokenizer.json").is_file():
        # From the configuration alone transformers would make a tokenizer with no vocabulary, and not say so.
        raise ConfigError(f"{path_or_id} has no tokenizer.json; copy it there from the model's page")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path_or_id, revision=revision, local_files_only=local, trust_remote_code=False, use_fast=True
        )
    except Exception as error:  # for a broken file the tokenizers library raises Exception itself
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"no tokenizer can be loaded from {path_or_id} ({reason}); the folder needs the model's own "
            "tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{path_or_id} has no tokenizer.json; download it from the model's page")
    return tokenizer
