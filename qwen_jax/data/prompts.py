"""Task or text -> prompt -> token ids, with over-long prompts handled in the open."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.data.arc import BadRecord, Grid, Task, Text, check_encodable
from qwen_jax.errors import ConfigError, UsageError

OVERLONG_POLICIES = ("drop_examples", "truncate", "skip")
_PREVIEW_CHARACTERS = 200
_INSTRUCTION = (
    "Each example turns an input grid into an output grid by the same rule. Cells are colours, 0 to 9. "
    "Find the rule and give the output grid of the test input.\n\n"
)


@dataclass(frozen=True)
class Segment:
    """A part of a prompt. role: "instruction", "example 1 input", "example 1 output", "test input", "text"."""

    role: str
    text: str


def _fenced_rows(grid: Grid) -> str:
    """Rows numbered from 1. Qwen's tokenizer makes every digit a token, so a cell is one token."""
    lines = [f"{number}: {''.join(map(str, row))}" for number, row in enumerate(grid, 1)]
    return "```\n" + "\n".join(lines) + "\n```\n"


def _plain_rows(grid: Grid) -> str:
    return "\n".join("".join(map(str, row)) for row in grid) + "\n"


def _json_rows(grid: Grid) -> str:
    return "[" + ",".join("[" + ",".join(map(str, row)) + "]" for row in grid) + "]\n"


def _task_prompt(task: Task, show: Callable[[Grid], str]) -> list[Segment]:
    segments = [Segment("instruction", _INSTRUCTION)]
    for number, pair in enumerate(task.train, 1):
        segments.append(Segment("instruction", f"Example {number}\nInput:\n"))
        segments.append(Segment(f"example {number} input", show(pair["input"])))
        segments.append(Segment("instruction", "Output:\n"))
        segments.append(Segment(f"example {number} output", show(pair["output"])))
        segments.append(Segment("instruction", "\n"))
    segments.append(Segment("instruction", "Test\nInput:\n"))
    segments.append(Segment("test input", show(task.test[0]["input"])))
    segments.append(Segment("instruction", "Output:\n"))
    return segments


PROMPT_FORMATS: dict[str, Callable[[Task], list[Segment]]] = {
    "rows": lambda task: _task_prompt(task, _fenced_rows),
    "plain": lambda task: _task_prompt(task, _plain_rows),
    "json": lambda task: _task_prompt(task, _json_rows),
}
"""How a task becomes a prompt, by name. Of several test inputs the first is asked for."""


@dataclass(frozen=True)
class TokenizedSample:
    """A sample ready to run.

    Attributes:
        token_ids: int32 [n_tokens].
        text_preview: the first 200 characters of the prompt that was tokenised, so without dropped examples.
        truncated: whether tokens were cut off on the right.
        dropped_examples: leading training examples left out to make it fit.
        full_length: tokens before any shortening.
    """

    sample_idx: int
    token_ids: np.ndarray
    text_preview: str
    task_id: str
    truncated: bool
    dropped_examples: int
    full_length: int


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
    ):
        """tokenizer: as load_tokenizer gives it. Raises UsageError for names that are in no table."""
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
        self._make_prompt = PROMPT_FORMATS[prompt_format]
        self._chat_template = chat_template
        self._max_seq_length = max_seq_length
        self._overlong = overlong

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
        return replace(full, token_ids=full.token_ids[: self._max_seq_length], truncated=True)

    def _drop_examples(self, full: TokenizedSample, task: Task) -> TokenizedSample | SkippedSample:
        for dropped in range(1, len(task.train) + 1):
            shorter = self._tokenize(full.sample_idx, replace(task, train=task.train[dropped:]), dropped)
            if len(shorter.token_ids) <= self._max_seq_length:
                return replace(shorter, full_length=full.full_length)
        return self._too_long(full, "test input without any example")

    def _too_long(self, full: TokenizedSample, what: str) -> SkippedSample:
        reason = f"{what} is longer than max_seq_length {self._max_seq_length}"
        return SkippedSample(full.sample_idx, full.task_id, reason, full.full_length)

    def _tokenize(self, sample_idx: int, record: Task | Text, dropped: int) -> TokenizedSample:
        text = self._prompt_text(record)
        check_encodable(text, "prompt")
        ids = np.asarray(
            self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32
        )
        preview = text[:_PREVIEW_CHARACTERS]
        return TokenizedSample(sample_idx, ids, preview, record.task_id, False, dropped, len(ids))

    def _prompt_text(self, record: Task | Text) -> str:
        if isinstance(record, Task):
            text = "".join(segment.text for segment in self._make_prompt(record))
        elif record.messages is not None:
            return self._apply_template(record.messages)
        else:
            text = record.text
        return self._apply_template([{"role": "user", "content": text}]) if self._chat_template else text

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
