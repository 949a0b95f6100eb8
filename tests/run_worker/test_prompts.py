"""A stream's lines become samples in order, whatever is encoded at once."""

import json
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qwen_jax.data import prompts
from qwen_jax.data.prompts import load_tokenizer
from qwen_jax.errors import BadDataError
from qwen_jax.run.sample_reader import PromptMaker, SampleReader
from tests.run_worker.conftest import TOKENIZER, arc_lines

LINES = 40
BAD = (4, 17, 18, 33)
TOO_LONG = 25


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TOKENIZER))


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Path:
    lines = arc_lines(LINES)
    for number in BAD:
        lines[number] = "{not JSON"
    lines[TOO_LONG] = json.dumps(
        {"train": [{"input": [[1]], "output": [[1]]}], "test": [{"input": [[1] * 3000]}]}
    )
    path = tmp_path_factory.mktemp("stream") / "stream_000.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def reader(tokenizer, stream: Path, first: int = 0, bad_before: int = 0, **settings) -> SampleReader:
    values = {
        "prompt_format": "rows",
        "chat_template": False,
        "rollout": 0,
        "max_seq_length": 2048,
        "overlong": "drop_examples",
        "include_answer": False,
        "keep_tokens": "random:0.5",
        "skip_first": 1,
        "skip_special_tokens": False,
        "stream_path": stream,
        "max_samples": None,
        "max_bad_records": len(BAD),
    }
    chosen = SimpleNamespace(**values | settings)
    return SampleReader(chosen, PromptMaker(chosen, tokenizer, "5eed"), first, bad_before)


def test_every_line_is_a_sample_or_skipped(tokenizer, stream):
    read = reader(tokenizer, stream)
    found = [sample.sample_idx for sample in read]
    skipped = {each.sample_idx: each for each in read.take_skipped()}
    assert sorted([*found, *skipped]) == list(range(LINES)) and found == sorted(found)
    assert {number for number, each in skipped.items() if each.bad_record} == set(BAD)
    assert not skipped[TOO_LONG].bad_record and skipped[TOO_LONG].full_length > 2048


@pytest.mark.parametrize("lines", [1, 3, 64])
def test_chunks_decide_nothing(tokenizer, stream, monkeypatch, lines):
    wanted = list(reader(tokenizer, stream))
    monkeypatch.setattr(prompts, "_CHUNK_LINES", lines)
    read = reader(tokenizer, stream)
    for sample, same in zip(read, wanted, strict=True):
        np.testing.assert_equal(asdict(sample), asdict(same))
        earlier = {each.sample_idx for each in read.take_skipped(sample.sample_idx)}
        assert earlier == {*takewhile(lambda each: each in (*BAD, TOO_LONG), range(sample.sample_idx)[::-1])}


@pytest.mark.parametrize("most", [1, 4, 20])
def test_no_line_past_max_samples_is_read(tokenizer, stream, tmp_path, most):
    """The next one would be one bad record too many."""
    bad = sum(number < most for number in BAD)
    path = tmp_path / "stream.jsonl"
    path.write_text("".join(stream.read_text().splitlines(keepends=True)[:most]) + "{not JSON\n")
    read = reader(tokenizer, path, max_samples=most, max_bad_records=bad)
    assert len(list(read)) + len(read.take_skipped()) == most


@pytest.mark.parametrize("first", [0, 5, 18])
def test_one_bad_record_too_many_ends_it_where_it_stands(tokenizer, stream, first):
    found = []
    read = iter(reader(tokenizer, stream, first, sum(number < first for number in BAD), max_bad_records=2))
    with pytest.raises(BadDataError, match=r"line 19: .*number 3, more than --max_bad_records 2"):
        while True:
            found.append(next(read).sample_idx)
    assert [n for n in found if n >= first] == [n for n in range(first, 18) if n not in BAD]


@pytest.mark.parametrize("first", [1, 5, LINES])
def test_reading_starts_at_the_first_sample(tokenizer, stream, first):
    wanted = [sample for sample in reader(tokenizer, stream) if sample.sample_idx >= first]
    read = reader(tokenizer, stream, first)
    for sample, same in zip(read, wanted, strict=True):
        np.testing.assert_equal(asdict(sample), asdict(same))
    assert [each.sample_idx for each in read.take_skipped()] == [
        n for n in sorted((*BAD, TOO_LONG)) if n >= first
    ]
