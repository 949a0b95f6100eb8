"""Prompts keep every cell, and never lose anything in silence."""

import json

import pytest

from qwen_jax.data.arc import Task, Text
from qwen_jax.data.layouts import PROMPT_FORMATS
from qwen_jax.data.prompts import (
    PromptEncoder,
    SkippedSample,
    TokenizedSample,
    load_tokenizer,
)
from qwen_jax.errors import ConfigError, UsageError

GRID = [[0, 1, 2], [3, 4, 5]]
WIDE = [[n % 10 for n in range(30)] for _ in range(30)]


def task(examples: int, test=GRID) -> Task:
    return Task("t", [{"input": GRID, "output": WIDE}] * examples, [{"input": test}])


def prompt_text(each: Task, prompt_format: str) -> str:
    return "".join(segment.text for segment in PROMPT_FORMATS[prompt_format].segments(each))


def test_prompts_differ_wherever_tasks_differ(arc_tasks):
    for prompt_format in PROMPT_FORMATS:
        assert len({prompt_text(each, prompt_format) for each in arc_tasks}) == len(arc_tasks)


def test_rows_are_numbered_digits_in_a_fence():
    text = prompt_text(task(1), "rows")
    assert "Example 1\nInput:\n```\n1: 012\n2: 345\n```\nOutput:\n```\n1: 0123456789" in text
    assert text.endswith("Test\nInput:\n```\n1: 012\n2: 345\n```\nOutput:\n")


def test_what_fits_is_left_alone(tokenizer):
    sample = PromptEncoder(tokenizer, max_seq_length=10_000).encode(7, task(3))
    assert isinstance(sample, TokenizedSample)
    assert (sample.sample_idx, sample.task_id, sample.truncated, sample.dropped_examples) == (
        7,
        "t",
        False,
        0,
    )
    assert sample.full_length == len(sample.token_ids)
    assert sample.token_ids.dtype == "int32"
    assert len(sample.text_preview) == 200


def test_the_fewest_leading_examples_are_dropped(tokenizer):
    lengths = [
        PromptEncoder(tokenizer, max_seq_length=100_000).encode(0, task(n)).full_length for n in range(5)
    ]
    for kept in range(5):
        sample = PromptEncoder(tokenizer, max_seq_length=lengths[kept]).encode(0, task(4))
        assert (len(sample.token_ids), sample.dropped_examples) == (lengths[kept], 4 - kept)
        assert (sample.full_length, sample.truncated) == (lengths[4], False)
        assert tokenizer.decode(sample.token_ids).endswith("1: 012\n2: 345\n```\nOutput:\n")


def test_leading_examples_go_first(tokenizer):
    two = Task("t", [{"input": [[7]], "output": WIDE}, {"input": [[8]], "output": WIDE}], [{"input": GRID}])
    limit = PromptEncoder(tokenizer, max_seq_length=100_000).encode(0, two).full_length - 1
    text = tokenizer.decode(PromptEncoder(tokenizer, max_seq_length=limit).encode(0, two).token_ids)
    assert "1: 8" in text and "1: 7" not in text


def test_a_test_input_that_does_not_fit_alone_is_skipped(tokenizer):
    skipped = PromptEncoder(tokenizer, max_seq_length=100).encode(3, task(2, test=WIDE))
    assert isinstance(skipped, SkippedSample)
    assert (skipped.sample_idx, skipped.bad_record) == (3, False)
    assert "100" in skipped.reason and skipped.full_length > 100


def test_other_policies(tokenizer):
    full = PromptEncoder(tokenizer, max_seq_length=100_000).encode(0, task(2)).token_ids
    cut = PromptEncoder(tokenizer, max_seq_length=50, overlong="truncate").encode(0, task(2))
    assert cut.truncated and cut.token_ids.tolist() == full[:50].tolist() and cut.full_length == len(full)
    skipped = PromptEncoder(tokenizer, max_seq_length=50, overlong="skip").encode(0, task(2))
    assert isinstance(skipped, SkippedSample) and skipped.full_length == len(full)


def test_text_is_cut_on_the_right_and_marked(tokenizer):
    text = Text("", text="one two three four five six seven " * 20)
    full = PromptEncoder(tokenizer).encode(0, text)
    cut = PromptEncoder(tokenizer, max_seq_length=9).encode(0, text)
    assert cut.truncated and cut.token_ids.tolist() == full.token_ids[:9].tolist()


def test_chat_template_wraps_the_prompt(tokenizer):
    plain = PromptEncoder(tokenizer, max_seq_length=100_000).encode(0, task(1))
    chat = PromptEncoder(tokenizer, chat_template=True, max_seq_length=100_000).encode(0, task(1))
    wrapped = tokenizer.decode(chat.token_ids)
    assert tokenizer.decode(plain.token_ids) in wrapped
    assert wrapped.endswith("<|im_start|>assistant\n")
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in chat.token_ids


def test_messages_use_the_template(tokenizer):
    messages = Text("", messages=[{"role": "user", "content": "hello"}])
    text = tokenizer.decode(PromptEncoder(tokenizer).encode(0, messages).token_ids)
    assert text.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")


def test_a_dialogue_that_ends_with_the_assistant_gets_no_second_header(tokenizer):
    dialogue = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    sample = PromptEncoder(tokenizer).encode(0, Text("", messages=dialogue))
    text = tokenizer.decode(sample.token_ids)
    assert text.endswith("<|im_start|>assistant\ngood day<|im_end|>\n") and text.count("assistant\n") == 1


def test_no_chat_template_is_said_so(tmp_path, demo_tokenizer):
    demo_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    bare = load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="--chat_template"):
        PromptEncoder(bare, chat_template=True)
    with pytest.raises(ConfigError, match="Instruct"):
        PromptEncoder(bare).encode(0, Text("", messages=[{"role": "user", "content": "hello"}]))


def test_only_names_of_the_tables_are_accepted(demo_tokenizer):
    with pytest.raises(UsageError, match="rows, plain, json"):
        PromptEncoder(demo_tokenizer, prompt_format="{task}")
    with pytest.raises(UsageError, match="drop_examples"):
        PromptEncoder(demo_tokenizer, overlong="cut")


def test_no_tokenizer_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_half_a_tokenizer_is_said_so(tmp_path, demo_tokenizer, file):
    """From tokenizer_config.json alone transformers makes a tokenizer of one token."""
    demo_tokenizer.save_pretrained(tmp_path)
    if file == "tokenizer.json":
        (tmp_path / file).write_text("{}")
    else:
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_what_cannot_become_tokens_is_a_bad_record_not_a_crash(demo_tokenizer, monkeypatch):
    skipped = PromptEncoder(demo_tokenizer).encode(4, Text("t", text="half \ud800"))
    assert isinstance(skipped, SkippedSample) and skipped.bad_record and "surrogate" in skipped.reason
    monkeypatch.setattr(demo_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    messages = Text("t", messages=[{"role": "assistant", "content": "hello"}])
    skipped = PromptEncoder(demo_tokenizer).encode(5, messages)
    assert isinstance(skipped, SkippedSample) and skipped.bad_record
    assert (skipped.sample_idx, skipped.task_id) == (5, "t")
    assert "roles must alternate" in skipped.reason
