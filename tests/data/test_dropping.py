"""Over-long prompts come out as if examples were dropped one by one, and the tokenizer is hardly asked."""

import json
import random
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.data import prompts, tokens
from qwen_jax.data.arc import BadRecord, Task, Text, parse_line, parse_record, parse_row_line, task_from_row
from qwen_jax.data.layouts import (
    PROMPT_FORMATS,
    Prompt,
    place_in_template,
)
from qwen_jax.data.prompts import PromptEncoder, SkippedSample, TokenizedSample
from qwen_jax.errors import ConfigError
from tests.data.test_tokens import Asked
from tests.few import few

REAL = Path(__file__).parents[3] / "shared" / "data"
PLAIN = {"prompt_format": "rows", "chat_template": False, "include_answer": False}
WAYS = [
    PLAIN,
    PLAIN | {"prompt_format": "json"},
    PLAIN | {"prompt_format": "plain", "include_answer": True},
    PLAIN | {"chat_template": True, "include_answer": True},
]


LONGEST_TOKEN = cache(prompts._longest_token)


@pytest.fixture(autouse=True)
def the_vocabulary_is_read_once(monkeypatch):
    """Reading takes as long as hundreds of prompts, and each test makes many encoders."""
    monkeypatch.setattr(prompts, "_longest_token", LONGEST_TOKEN)


class OneByOne:
    """A task's prompts as the loop makes them: the whole text tokenised again for each dropped example."""

    def __init__(self, tokenizer, task: Task, prompt_format: str, chat_template: bool, include_answer: bool):
        self.without = cache(self._without)
        self._tokenizer, self._task, self._layout = tokenizer, task, PROMPT_FORMATS[prompt_format]
        self._chat_template, self._include_answer = chat_template, include_answer

    def _without(self, dropped: int) -> TokenizedSample:
        segments = self._layout.segments(self._task, dropped)
        if self._chat_template:
            segments = place_in_template(self._render, [segments])
        if self._include_answer and "output" in self._task.test[0]:
            segments = [*segments, self._layout.answer(self._task)]
        prompt = Prompt(segments)
        encoded = self._tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], np.int32)
        spans = np.array(encoded["offset_mapping"], np.int32).reshape(-1, 2)
        roles, cells, preview = prompt.token_roles(spans), prompt.token_cells(spans), prompt.text[:200]
        return TokenizedSample(
            0, ids, roles, cells, preview, self._task.task_id, False, dropped, 0, None, self._include_answer
        )

    def _render(self, texts: list[str]) -> str:
        messages = [{"role": "user", "content": text} for text in texts]
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def sample(self, max_seq_length: int) -> dict:
        full_length = len(self.without(0).token_ids)
        for dropped in range(len(self._task.train) + 1):
            if len(self.without(dropped).token_ids) <= max_seq_length:
                return asdict(self.without(dropped)) | {"full_length": full_length}
        reason = f"test input without any example is longer than max_seq_length {max_seq_length}"
        return asdict(SkippedSample(0, self._task.task_id, reason, full_length))


def check(tokenizer, task: Task, way: dict, lengths: list[int]) -> None:
    wanted = OneByOne(tokenizer, task, **way)
    for max_seq_length in lengths:
        found = PromptEncoder(tokenizer, max_seq_length=max_seq_length, **way).encode(0, task)
        same(asdict(found), wanted.sample(max_seq_length))


def same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype, name
            np.testing.assert_array_equal(found[name], value, name)
        else:
            assert found[name] == value, name


def real_tasks() -> list[Task]:
    if not REAL.is_dir():
        pytest.skip("no real prompts are beside this checkout")
    lines = [line for path in sorted(REAL.glob("*.jsonl")) for line in path.read_bytes().splitlines()]
    return [parse_record(task_from_row(parse_row_line(line), "examples", "t")) for line in lines]


@pytest.mark.parametrize("every", [160, pytest.param(1, marks=pytest.mark.slow)])
def test_real_prompts(tokenizer, every):
    for number, task in enumerate(real_tasks()[::every]):
        check(tokenizer, task, WAYS[number % len(WAYS)], [512, 1024, 2048, 4096, 8192, 32_768])


def drawn_task(rng: random.Random, examples: int, most: int) -> Task:
    def grid() -> list[list[int]]:
        height, width = rng.randint(1, most), rng.randint(1, most)
        return [[rng.randrange(10) for _ in range(width)] for _ in range(height)]

    train = [{"input": grid(), "output": grid()} for _ in range(examples)]
    return Task("drawn", train, [{"input": grid(), "output": grid()}])


def edges(lengths: list[int]) -> list[int]:
    """Just enough for some prompts, and one too few."""
    return sorted({length - less for length in lengths for less in (0, 1)}, reverse=True)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("examples", "most"), few([(5, 12), (50, 1), (1, 12), (20, 5)]))
def test_drawn_tasks_to_the_token(tokenizer, way, examples, most):
    rng = random.Random(examples * most)
    task = drawn_task(rng, examples, most)
    wanted = OneByOne(tokenizer, task, **way)
    chosen = {0, 1, examples - 1, examples, *rng.sample(range(examples), min(3, examples))}
    check(tokenizer, task, way, edges([len(wanted.without(dropped).token_ids) for dropped in chosen]))


@pytest.fixture(scope="module")
def merging(arc_tasks, demo_tokenizer):
    """A tokenizer that joins digits with each other and with what stands around them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [Prompt(PROMPT_FORMATS["rows"].segments(task)).text[:1500] for task in arc_tasks[::40]]
    backend.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    made.chat_template = demo_tokenizer.chat_template
    return made


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("examples", "most"), few([(3, 12), (50, 1), (30, 3)]))
def test_a_tokenizer_whose_counts_do_not_add_up(merging, way, examples, most):
    task = drawn_task(random.Random(examples), examples, most)
    wanted = OneByOne(merging, task, **way)
    chosen = range(0, examples + 1, max(1, examples // 8))
    check(merging, task, way, edges([len(wanted.without(dropped).token_ids) for dropped in chosen]))


def test_a_template_that_rewrites_the_prompt(demo_tokenizer, monkeypatch):
    """Then nothing says where the examples stand."""
    monkeypatch.setattr(demo_tokenizer, "chat_template", "{{ messages[0].content.replace('Input', 'In') }}")
    task = drawn_task(random.Random(1), 6, 4)
    for prompt_format in PROMPT_FORMATS:
        way = PLAIN | {"prompt_format": prompt_format, "chat_template": True}
        lengths = [len(OneByOne(demo_tokenizer, task, **way).without(k).token_ids) for k in range(7)]
        check(demo_tokenizer, task, way, edges(lengths))


@pytest.mark.parametrize("examples", [2, 15, 120])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_a_prompt_is_tokenised_three_times_at_most(demo_tokenizer, monkeypatch, examples, share):
    """Also where it must be read as a whole."""
    for module in (tokens, prompts):
        monkeypatch.setattr(module, "keeps_digits_apart", lambda tokenizer: False)
    task = drawn_task(random.Random(examples), examples, 4)
    full = len(OneByOne(demo_tokenizer, task, **PLAIN).without(0).token_ids)
    asked = Asked(demo_tokenizer)
    PromptEncoder(asked, max_seq_length=int(share * full)).encode(0, task)
    assert len(asked.texts) <= 3


def test_qwens_tokenizer_is_never_asked_for_a_whole_prompt(tokenizer):
    asked = Asked(tokenizer)
    encoder = PromptEncoder(asked, max_seq_length=1000)
    records = [(n, drawn_task(random.Random(n), 60, 5)) for n in range(10)]
    assert all(sample.dropped_examples for sample in encoder.encode_many(records))
    assert len(asked.texts) < 50 and max(map(len, asked.texts)) < 300


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("examples", "most"), few([(20, 5), (50, 1), (12, 12)]))
def test_examples_that_cannot_fit_are_never_tokenised_and_all_else_is_as_ever(
    demo_tokenizer, monkeypatch, way, examples, most
):
    """By their bytes alone; only how long the whole would have been is then not known."""
    task = drawn_task(random.Random(examples + most), examples, most)
    wanted = OneByOne(demo_tokenizer, task, **way)
    monkeypatch.setattr(prompts, "_BYTES_AT_LEAST", 1)
    # No token of these is longer, on average.
    monkeypatch.setattr(prompts, "_longest_token", lambda tokenizer: 4)
    asked_less = 0
    for max_seq_length in (200, 400, 800, 1600):
        asked = Asked(demo_tokenizer)
        found = asdict(PromptEncoder(asked, max_seq_length=max_seq_length, **way).encode(0, task))
        same(found, wanted.sample(max_seq_length) | {"full_length": found["full_length"]})
        asked_less += found["full_length"] < len(wanted.without(0).token_ids)
    assert asked_less


def test_a_prompt_that_fits_has_no_more_bytes_than_are_read(tokenizer):
    longest = max(tokenizer.get_vocab(), key=len)
    text = tokenizer.convert_tokens_to_string([longest]) * 100
    (found,) = tokens.batch_tokenizer(tokenizer)([text])
    assert len(text) <= len(found.ids) * len(longest)
    assert prompts.most_prompt_bytes(tokenizer, 32_768) == max(1 << 20, 32_768 * len(longest))


@pytest.mark.parametrize("overlong", ["drop_examples", "truncate", "skip"])
@pytest.mark.parametrize(
    "record",
    [
        Text("t", text="x" * (31 << 20)),
        Text("t", text="\U00020000" * (1 << 19)),
        Text("t", messages=[{"role": "user", "content": "x"}] * 100_000),
        Task("t", [{"input": [[1] * 30] * 30, "output": [[1] * 30] * 30}], [{"input": [[1] * 2000] * 1000}]),
    ],
    ids=["text", "rare characters", "messages", "task"],
)
def test_what_is_far_too_long_is_skipped_without_a_look(demo_tokenizer, monkeypatch, overlong, record):
    asked = Asked(demo_tokenizer)
    encoder = PromptEncoder(asked, max_seq_length=2048, overlong=overlong)
    monkeypatch.setattr(encoder, "_prompt", None)
    asked.texts.clear()
    skipped = encoder.encode(0, record)
    assert isinstance(skipped, SkippedSample) and not skipped.bad_record and not asked.texts
    words = "more than 1,048,576 bytes" if overlong == "truncate" else "longer than max_seq_length 2048"
    if overlong == "drop_examples" and isinstance(record, Text):
        words = "more than 1,048,576 bytes"
    assert words in skipped.reason


def test_no_more_examples_are_dropped_unseen_than_have_too_many_bytes(demo_tokenizer, monkeypatch):
    task = drawn_task(random.Random(7), 30, 9)
    encoder = PromptEncoder(demo_tokenizer)
    sizes = PROMPT_FORMATS["rows"].least_characters(task)
    for limit in (sum(sizes), sum(sizes) - 1, sum(sizes[7:]), sum(sizes[7:]) - 1, sizes[-1]):
        monkeypatch.setattr(encoder, "_most_bytes", limit)
        dropped = encoder._surely_dropped(task)
        assert sum(sizes[dropped:]) <= limit and (not dropped or sum(sizes[dropped - 1 :]) > limit)
    monkeypatch.setattr(encoder, "_most_bytes", sizes[-1] - 1)
    assert encoder._surely_dropped(task) is None


@pytest.mark.parametrize("prompt_format", PROMPT_FORMATS)
def test_the_characters_of_a_grid_are_counted_without_its_text(prompt_format):
    layout = PROMPT_FORMATS[prompt_format]
    task = drawn_task(random.Random(3), 20, 30)
    for pair in task.train:
        assert layout.characters(pair["input"]) == len(layout.show(0, 0, pair["input"]).text)


def mixed_records() -> list[tuple[int, Task | Text | BadRecord]]:
    lines = [
        b"{}",
        *(json.dumps({"text": f"text {n} " * n}).encode() for n in range(1, 90)),
        '{"text": "世界 é"}'.encode(),
    ]
    records: list = []
    for number, line in enumerate(lines):
        try:
            records.append(parse_line(line))
        except BadRecord as bad:
            records.append(bad)
        records.append(drawn_task(random.Random(number), 3, 9))
    return list(enumerate(records))


@pytest.mark.parametrize("overlong", ["drop_examples", "truncate", "skip"])
def test_many_records_are_those_one_by_one(demo_tokenizer, overlong):
    encoder = PromptEncoder(demo_tokenizer, max_seq_length=300, overlong=overlong)
    records = mixed_records()
    many = list(encoder.encode_many(records))
    assert [each.sample_idx for each in many] == [sample_idx for sample_idx, _ in records]
    for record, found in zip(records, many, strict=True):
        same(asdict(found), asdict(encoder.encode(*record)))
    assert many[0].bad_record and not any(getattr(each, "bad_record", False) for each in many[1:])


@pytest.mark.parametrize(("text", "read"), [("short", 64), ("a long text " * 2500, 5)])
def test_few_lines_are_read_ahead(demo_tokenizer, text, read):
    """64 lines, or some 131,072 characters."""
    taken = []

    def records():
        for number in range(1000):
            taken.append(number)
            yield number, Text("t", text=text)

    made = PromptEncoder(demo_tokenizer).encode_many(records())
    assert next(made).sample_idx == 0 and len(taken) == read
    assert next(made).sample_idx == 1 and len(taken) == read


def test_what_comes_before_an_error_comes_out(demo_tokenizer, monkeypatch):
    monkeypatch.setattr(demo_tokenizer, "chat_template", None)
    chat = Text("t", messages=[{"role": "user", "content": "hello"}])
    made = PromptEncoder(demo_tokenizer).encode_many([(0, Text("t", text="hello")), (1, chat)])
    assert next(made).sample_idx == 0
    with pytest.raises(ConfigError, match="no chat template"):
        next(made)
