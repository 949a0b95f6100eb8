"""Task or text -> prompt -> token ids, with over-long prompts handled in the open."""

import json
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from qwen_jax.data.arc import BadRecord, Notes, Task, Text, check_encodable
from qwen_jax.data.layouts import (
    PROMPT_FORMATS,
    Prompt,
    PromptFormat,
    Segment,
    place_in_template,
    tagged,
)
from qwen_jax.data.template import SUFFIX, read_template
from qwen_jax.data.tokens import Tokens, batch_tokenizer, keeps_digits_apart
from qwen_jax.errors import ConfigError, UsageError, first_line
from qwen_jax.roles import ANSWER, ASSISTANT, ROLLOUT, SYSTEM, TEMPLATE, TEXT, THINK, TOOL, USER, example_role


def format_called(name: str) -> PromptFormat:
    """Of PROMPT_FORMATS, or from a template file; raises UsageError."""
    if name in PROMPT_FORMATS:
        return PROMPT_FORMATS[name]
    if not name.endswith(SUFFIX):
        raise UsageError(
            f"--prompt_format {name}: choose from {', '.join(PROMPT_FORMATS)}, or give a template, NAME{SUFFIX}"
        )
    return read_template(name)


OVERLONG_POLICIES = ("drop_examples", "truncate", "skip")
_PREVIEW_CHARACTERS = 200
# Tokenised at once: enough to keep all cores busy where the tokenizer reads whole texts, few enough to hold.
_CHUNK_LINES = 64
CHUNK_BYTES = 1 << 17
_BYTES_AT_LEAST = 1 << 20
_MESSAGE_BYTES = 16
_MESSAGE_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL}
_REASONING = "reasoning_content"


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
        full_length: tokens before any shortening; without the examples that have too many bytes (most_prompt_bytes)
            to fit.
        positions: int32 [n_kept], ascending: the tokens whose activations are kept; None is all of them.
        with_answer: whether the log-probabilities of the tokens of roles ANSWER and ROLLOUT are wanted.
        notes: what its line says of it besides (kinds.NOTES).
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
    notes: Notes = field(default_factory=dict)

    @property
    def n_kept(self) -> int:
        return len(self.token_ids) if self.positions is None else len(self.positions)

    @property
    def kept_positions(self) -> np.ndarray:
        """int32 [n_kept]: the same, spelled out where all are kept."""
        return np.arange(self.n_kept, dtype=np.int32) if self.positions is None else self.positions

    def kept(self, values: np.ndarray) -> np.ndarray:
        """The entries of `values`, one a token, that are kept."""
        return values if self.positions is None else values[self.positions]

    @property
    def answer_positions(self) -> np.ndarray:
        """int32: where the answer's tokens stand; none unless they are wanted."""
        # The first token has nothing before it that could foretell it.
        answers = np.isin(self.roles[1:], (ANSWER, ROLLOUT))
        return 1 + np.flatnonzero(self.with_answer & answers).astype(np.int32)


@dataclass(frozen=True)
class SkippedSample:
    """A sample that is left out. full_length: tokens, 0 where they were not counted. bad_record: the line itself is
    faulty, rather than only too long."""

    sample_idx: int
    task_id: str
    reason: str
    full_length: int
    bad_record: bool = False


_Record = tuple[int, Task | Text | BadRecord]
_Steps = Generator[str, Tokens, TokenizedSample | SkippedSample]
_Shortening = Generator[str, Tokens, tuple[int, Prompt, Tokens] | None]


class _Making:
    """A sample being made, while others are, so that their texts can be tokenised together.

    wanted: the text whose tokens are to be handed to `go_on`; None when all is done.
    """

    def __init__(self, steps: _Steps):
        self.wanted: str | None = None
        self._steps = steps
        self._result: TokenizedSample | SkippedSample | None = None
        self._error: ConfigError | None = None
        self.go_on(None)

    def go_on(self, tokens: Tokens | None) -> None:
        try:
            self.wanted = next(self._steps) if tokens is None else self._steps.send(tokens)
        except StopIteration as end:
            self.wanted, self._result = None, end.value
        except ConfigError as error:
            self.wanted, self._error = None, error

    def result(self) -> TokenizedSample | SkippedSample:
        if self._error is not None:
            raise self._error
        assert self._result is not None  # nothing is wanted any more
        return self._result


def most_prompt_bytes(tokenizer: Any, max_seq_length: int) -> int:
    """Bytes (UTF-8) of a prompt that is made into tokens: any prompt that fits has fewer."""
    return max(_BYTES_AT_LEAST, max_seq_length * _longest_token(tokenizer))


def _longest_token(tokenizer: Any) -> int:
    """Bytes of it: the vocabulary of a tokenizer such as Qwen's shows each byte of a token as a character."""
    return max(map(len, tokenizer.get_vocab()))


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
        if overlong not in OVERLONG_POLICIES:
            raise UsageError(f"--overlong {overlong}: choose from {', '.join(OVERLONG_POLICIES)}")
        if chat_template and not tokenizer.chat_template:
            raise ConfigError(
                "--chat_template: this model's tokenizer has no chat template; use an Instruct model, or leave "
                "the flag out"
            )
        self._tokenizer = tokenizer
        self._tokens = batch_tokenizer(tokenizer)
        self._digits_apart = keeps_digits_apart(tokenizer)
        self._format = format_called(prompt_format)
        self._first_ids = _first_ids(tokenizer)
        self._chat_template = chat_template
        self._max_seq_length = max_seq_length
        self._most_bytes = most_prompt_bytes(tokenizer, max_seq_length)
        self._overlong = overlong
        self._include_answer = include_answer

    def encode(self, sample_idx: int, record: Task | Text) -> TokenizedSample | SkippedSample:
        """encode_many of one record."""
        (encoded,) = self.encode_many([(sample_idx, record)])
        return encoded

    def encode_many(self, records: Iterable[_Record]) -> Iterator[TokenizedSample | SkippedSample]:
        """Tokenises records, each with its sample_idx, many at once; what does not fit is shortened or skipped.

        As `overlong` says: `drop_examples` leaves out as few leading training examples of a task as make it fit,
        and cuts text on the right; `truncate` cuts everything on the right; `skip` skips. A task whose test input
        does not fit even alone is skipped, and so is a prompt of more than `most_prompt_bytes`. No special tokens are
        added but those of the chat template. A record that cannot become tokens at all is skipped as a bad one.
        Reads a bounded number of bytes ahead, and yields in order. Raises ConfigError, after what comes before,
        for chat messages where the tokenizer has no chat template.
        """
        for chunk in _chunks(records):
            makings = [_Making(self._making(sample_idx, record)) for sample_idx, record in chunk]
            while waiting := [making for making in makings if making.wanted is not None]:
                tokens = self._tokens([making.wanted or "" for making in waiting])
                for making, found in zip(waiting, tokens, strict=True):
                    making.go_on(found)
            for making in makings:
                yield making.result()

    def _making(self, sample_idx: int, record: Task | Text | BadRecord) -> _Steps:
        """Makes one sample; yields each text whose tokens it needs."""
        if isinstance(record, BadRecord):
            return SkippedSample(sample_idx, "", str(record), 0, True)
        dropped = self._surely_dropped(record)
        if dropped is None:
            return self._beyond(sample_idx, record)
        try:
            prompt = self._prompt(record, dropped)
        except BadRecord as bad:
            return SkippedSample(sample_idx, record.task_id, str(bad), 0, True)
        tokens = self._begun(record, (yield prompt.text))
        n_tokens = len(tokens.ids)
        if not n_tokens:
            return SkippedSample(sample_idx, record.task_id, "prompt has no tokens", 0, True)
        fits = n_tokens <= self._max_seq_length
        if not fits and self._overlong == "skip":
            return self._too_long(sample_idx, record, "prompt", n_tokens)
        if not fits and self._drops_of(record):
            shorter = yield from self._shortened(record, prompt, tokens, dropped)
            if shorter is None:
                return self._too_long(sample_idx, record, "test input without any example", n_tokens)
            dropped, prompt, tokens = shorter
        return self._sample(sample_idx, record, prompt, tokens, dropped, n_tokens)

    def _begun(self, record: Task | Text, tokens: Tokens) -> Tokens:
        """With the tokens that the tokenizer puts before a text; a chat template has its own."""
        if not len(self._first_ids) or self._in_chat(record) or not len(tokens.ids):
            return tokens
        nowhere = np.zeros((len(self._first_ids), 2), np.int32)
        return Tokens(np.concatenate([self._first_ids, tokens.ids]), np.concatenate([nowhere, tokens.spans]))

    def _in_chat(self, record: Task | Text) -> bool:
        return self._chat_template or (isinstance(record, Text) and record.messages is not None)

    def _drops_of(self, record: Task | Text) -> TypeGuard[Task]:
        """Whether examples may be left out of it."""
        return self._overlong == "drop_examples" and isinstance(record, Task)

    def _surely_dropped(self, record: Task | Text) -> int | None:
        """Examples to drop before anything is made of the rest, since it has too many bytes to fit; None where
        nothing is left then."""
        if not self._drops_of(record):
            return 0 if _bytes(record) <= self._most_bytes else None
        before, left = self._format.least_characters(record), self._most_bytes
        for number in range(len(before) - 1, -1, -1):
            left -= before[number]
            if left < 0:
                return number + 1 if number + 1 < len(before) else None
        return 0

    def _beyond(self, sample_idx: int, record: Task | Text) -> SkippedSample:
        if self._drops_of(record) or self._overlong == "skip":
            what = "test input without any example" if self._drops_of(record) else "prompt"
            return self._too_long(sample_idx, record, what, 0)
        reason = (
            f"prompt has more than {self._most_bytes:,} bytes, which is all that is read of one with "
            f"max_seq_length {self._max_seq_length}"
        )
        return SkippedSample(sample_idx, record.task_id, reason, 0)

    def _shortened(self, task: Task, prompt: Prompt, tokens: Tokens, before: int) -> _Shortening:
        """The fewest examples to drop, with what is then left of the prompt; None if it never fits.

        prompt, tokens: without the first `before` examples. The tokens say how many are left without more of them:
        exactly, if the tokenizer keeps digits apart. If not, or if it turns out otherwise, the neighbours are tried
        one by one.
        """
        if before == len(task.train):
            return None
        expected = _expected_lengths(task, prompt, tokens, before)
        dropped = before + 1 + int(np.argmax(expected[1:] <= self._max_seq_length))
        too_few, found = before, None
        while found is None or found[0] > too_few + 1:
            shorter = self._prompt(task, dropped)
            left = self._begun(task, (yield shorter.text))
            if len(left.ids) <= self._max_seq_length:
                found = dropped, shorter, left
                if self._digits_apart and len(left.ids) == expected[dropped - before]:
                    break
                dropped -= 1
            elif dropped == len(task.train):
                break
            else:
                too_few = dropped
                dropped += 1
        return found

    def _sample(
        self,
        sample_idx: int,
        record: Task | Text,
        prompt: Prompt,
        tokens: Tokens,
        dropped: int,
        full_length: int,
    ) -> TokenizedSample:
        """The first max_seq_length tokens."""
        spans = tokens.spans[: self._max_seq_length]
        roles = prompt.token_roles(spans)
        if not self._in_chat(record):
            roles[: len(self._first_ids)] = TEMPLATE
        return TokenizedSample(
            sample_idx,
            tokens.ids[: self._max_seq_length],
            roles,
            prompt.token_cells(spans),
            prompt.text[:_PREVIEW_CHARACTERS],
            record.task_id,
            truncated=len(tokens.ids) > self._max_seq_length,
            dropped_examples=dropped,
            full_length=full_length,
            with_answer=self._include_answer,
            notes=record.notes,
        )

    def _too_long(self, sample_idx: int, record: Task | Text, what: str, full_length: int) -> SkippedSample:
        reason = f"{what} is longer than max_seq_length {self._max_seq_length}"
        return SkippedSample(sample_idx, record.task_id, reason, full_length)

    def _prompt(self, record: Task | Text, dropped: int) -> Prompt:
        prompt = Prompt(self._segments(record, dropped))
        check_encodable(prompt.text, "prompt")
        return prompt

    def _segments(self, record: Task | Text, dropped: int) -> list[Segment]:
        """The prompt's parts, the chat template and the answer included where they are asked for."""
        if isinstance(record, Text) and record.messages is not None:
            return self._dialogue(record.messages, record.tools)
        if isinstance(record, Text):
            return self._as_user([Segment(TEXT, record.text or "")])
        segments = self._as_user(self._format.segments(record, dropped))
        answer = self._format.answer(record) if self._include_answer else None
        return segments if answer is None else [*segments, answer]

    def _as_user(self, segments: list[Segment]) -> list[Segment]:
        """One user message in the chat template if that is asked for, else as it is."""
        if not self._chat_template:
            return segments
        return place_in_template(
            lambda texts: self._apply_template([{"role": "user", "content": texts[0]}]), [segments]
        )

    def _dialogue(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[Segment]:
        """A chat in its template. What a message thinks and what it says stand apart, as the template shows them."""
        if self._shows_reasoning:
            messages = [_with_reasoning_apart(message) for message in messages]
        slots = [
            (number, key)
            for number, message in enumerate(messages)
            for key in (_REASONING, "content")
            if key in message
        ]

        def render(texts: list[str]) -> str:
            filled = [dict(message) for message in messages]
            for (number, key), text in zip(slots, texts, strict=True):
                filled[number][key] = text
            return self._apply_template(filled, tools)

        contents = [[_message_segment(messages[number], key)] for number, key in slots]
        return list(tagged(place_in_template(render, contents)))

    @property
    def _shows_reasoning(self) -> bool:
        return _REASONING in str(self._tokenizer.chat_template)

    def _apply_template(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
        if not self._tokenizer.chat_template:
            raise ConfigError(
                "the stream has chat messages, but this model's tokenizer has no chat template; use an Instruct "
                "model, or a stream with text"
            )
        from jinja2 import TemplateError

        try:
            # A dialogue that ends with the assistant's words asks for no more of them.
            asks = messages[-1]["role"] != "assistant"
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=asks
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRecord(f"the chat template refuses the messages: {error}") from error


def _chunks(records: Iterable[_Record]) -> Iterator[list[_Record]]:
    """Cuts the records where _CHUNK_LINES or CHUNK_BYTES are reached."""
    chunk: list[_Record] = []
    size = 0
    for sample_idx, record in records:
        chunk.append((sample_idx, record))
        size += _bytes(record)
        if len(chunk) == _CHUNK_LINES or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _bytes(record: Task | Text | BadRecord) -> int:
    """About as many as its prompt has."""
    if isinstance(record, BadRecord):
        return 0
    if isinstance(record, Task):
        grids = (grid for pair in (*record.train, *record.test) for grid in pair.values())
        return sum(len(grid) * len(grid[0]) for grid in grids)
    if record.messages is not None:
        texts = (text for message in record.messages for text in message.values() if isinstance(text, str))
        calls = [message["tool_calls"] for message in record.messages if "tool_calls" in message]
        said = sum(map(_utf8, texts)) + _MESSAGE_BYTES * len(record.messages)
        return said + (_utf8(json.dumps([calls, record.tools])) if calls or record.tools else 0)
    return _utf8(record.text or "")


def _utf8(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _expected_lengths(task: Task, prompt: Prompt, tokens: Tokens, before: int = 0) -> np.ndarray:
    """int [examples + 1]: the tokens of a task's prompt without 0, 1, ... of its examples from number `before` on.

    prompt, tokens: the one without those before. Exact but for the last entry, which is -1, where a digit is a token
    and splits the text in the same way wherever it stands. All are -1 where the prompt does not show where its
    examples are.
    """
    examples = len(task.train) - before
    grids = prompt.starts([example_role(before + number, "input") for number in range(1, examples + 1)])
    expected = np.full(examples + 1, -1)
    if grids is None:
        return expected
    firsts = np.searchsorted(tokens.spans[:, 0], grids)
    # Examples are numbered from 1 again: without k of them, those that were k + 1, ... are 1, ...
    digits = np.cumsum([0, *(len(str(number)) for number in range(1, examples + 1))])
    dropped = np.arange(examples)
    renumbered = (digits[examples] - digits[dropped + 1]) - (digits[examples - dropped] - digits[1])
    expected[:-1] = len(tokens.ids) - (firsts - firsts[0]) - renumbered
    return expected


def _message_segment(message: dict[str, Any], key: str) -> Segment:
    return Segment(
        THINK if key == _REASONING else _MESSAGE_ROLES.get(message["role"], TEMPLATE), message[key]
    )


def _with_reasoning_apart(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message of which the content begins with what it thinks, as templates split it themselves."""
    if message["role"] != "assistant" or _REASONING in message or "</think>" not in message["content"]:
        return message
    thought, _, _ = message["content"].partition("</think>")
    _, _, said = message["content"].rpartition("</think>")
    _, _, thought = thought.rpartition("<think>")
    return message | {_REASONING: thought.strip("\n"), "content": said.lstrip("\n")}


def _first_ids(tokenizer: Any) -> np.ndarray:
    """int32: what the tokenizer by itself puts before a text. Qwen's puts nothing there, Llama's a token."""
    backend = tokenizer.backend_tokenizer
    with_special, plain = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
    offsets = range(len(with_special) - len(plain) + 1)
    first = next((offset for offset in offsets if with_special[offset : offset + len(plain)] == plain), 0)
    return np.asarray(with_special[:first], np.int32)


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
        raise ConfigError(
            f"no tokenizer can be loaded from {path_or_id} ({first_line(error)}); the folder needs the model's own "
            "tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{path_or_id} has no tokenizer.json; download it from the model's page")
    return tokenizer
