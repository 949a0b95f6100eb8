"""Only valid records pass; everything else is a BadRecord with a reason, never a crash."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.data.arc import BadRecord, Task, Text, parse_line, task_from_row

GRID = [[0, 1], [2, 9]]
PAIR = {"input": GRID, "output": GRID}
TASK = {"task_id": "t", "train": [PAIR], "test": [{"input": GRID}]}


def line(obj) -> bytes:
    return json.dumps(obj).encode()


def test_a_task_keeps_its_test_output_when_the_source_has_it():
    assert parse_line(line(TASK)) == Task("t", [PAIR], [{"input": GRID}])
    assert parse_line(line(TASK | {"test": [PAIR]})).test == [PAIR]


@pytest.mark.parametrize("key", ["text", "prompt"])
def test_text_rows(key):
    assert parse_line(line({key: "hello"})) == Text("", text="hello")


def test_message_rows():
    messages = [{"role": "user", "content": "hello"}]
    assert parse_line(line({"messages": messages, "task_id": "m"})) == Text("m", messages=messages)


def test_a_message_may_be_empty():
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]
    assert parse_line(line({"messages": messages})).messages == messages


def test_null_fields_count_as_absent():
    """Parquet gives every row every column of the table."""
    nulls = dict.fromkeys(["train", "test", "messages", "text", "prompt", "examples", "task_id"])
    assert parse_line(line(nulls | {"prompt": "hi"})) == Text("", text="hi")
    assert task_from_row(nulls | {"prompt": "hi"}, "examples", "row-3") == {"task_id": "row-3", "text": "hi"}
    row = nulls | {"source": "s", "examples": [[GRID, GRID], [GRID, GRID]]}
    assert task_from_row(row, "examples", "row-3") == {"task_id": "s", "train": [PAIR], "test": [PAIR]}


@pytest.mark.parametrize("depth", [100, 500, 900])
def test_deep_rows_are_bad_or_harmless_but_never_crash(depth):
    deep = json.loads("[" * depth + "]" * depth)
    with pytest.raises(BadRecord):
        task_from_row({"examples": deep}, "examples", "row-0")
    with pytest.raises(BadRecord):
        task_from_row({"examples": json.dumps(deep)}, "examples", "row-0")
    assert task_from_row({"text": "a", "notes": deep}, "examples", "r") == {"task_id": "r", "text": "a"}


def test_a_valid_line_of_millions_of_lists_is_never_unpacked(monkeypatch):
    monkeypatch.setattr("qwen_jax.data.arc.parse_json", None)
    with pytest.raises(BadRecord, match="more lists and objects"):
        parse_line(b'{"text": "a", "more": [' + b"{}," * 1_300_000 + b"0]}")


def test_the_most_lists_for_their_bytes_that_a_task_has_are_few():
    column = {"input": [[1]] * 30, "output": [[1]] * 30}
    train = [column] * 9000
    assert len(parse_line(line({"train": train, "test": [column]}).replace(b" ", b"")).train) == 9000


def test_a_byte_order_mark_and_crlf_are_tolerated():
    assert parse_line(b"\xef\xbb\xbf" + line(TASK) + b"\r\n") == parse_line(line(TASK))


BAD = {
    "empty": (b"\n", "empty line"),
    "not json": (b"{nope", "not JSON"),
    "nul": (b"\x00" * 8, "not JSON"),
    "not utf-8": (b'{"text": "\xff"}', "not UTF-8"),
    "list": (b"[1]", "not a JSON object"),
    "nan": (b'{"text": NaN}', "NaN"),
    "huge int": (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "surrogate": (b'{"text": "a\\ud800b"}', "surrogate"),
    "unknown": (b'{"a": 1, "b": 2}', "its keys: a, b"),
    "half a surrogate in a key": (b'{"\\ud800": 1}', r"its keys: \\ud800$"),
    "long key": (b'{"' + b"k" * 5000 + b'": 1}', "its keys: k{40}$"),
    "all null": (b'{"text": null, "train": null}', "its keys: text, train"),
    "blank text": (b'{"text": "  "}', "empty"),
    "no messages": (b'{"messages": []}', "messages"),
    "message without role": (b'{"messages": [{"content": "x"}]}', r"messages\[0\]"),
    "no pairs": (line(TASK | {"train": []}), "train"),
    "pair without output": (line(TASK | {"train": [{"input": GRID}]}), r"train\[0\].output"),
    "ragged": (line(TASK | {"test": [{"input": [[1, 2], [3]]}]}), "ragged: rows of 1 to 2"),
    "empty grid": (line(TASK | {"test": [{"input": [[]]}]}), "empty grid"),
    "no grid": (line(TASK | {"test": [{"input": "x"}]}), "not a grid"),
    "cell 10": (line(TASK | {"test": [{"input": [[10]]}]}), "cell 10"),
    "cell -1": (line(TASK | {"test": [{"input": [[-1]]}]}), "cell -1"),
    "cell true": (line(TASK | {"test": [{"input": [[True]]}]}), "bool"),
    "cell 1.0": (line(TASK | {"test": [{"input": [[1.0]]}]}), "float"),
}


@pytest.mark.parametrize("raw, words", BAD.values(), ids=BAD)
def test_bad_lines_say_why(raw, words):
    with pytest.raises(BadRecord, match=words):
        parse_line(raw)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_parser(raw):
    try:
        assert isinstance(parse_line(raw), Task | Text)
    except BadRecord as bad:
        assert str(bad)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


# In a fresh checkout the first example waits for Hypothesis to build its table of characters, some seconds.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["train", "test", "text", "messages", "task_id"]), json_values))
def test_no_json_crashes_the_parser(obj):
    try:
        parse_line(json.dumps(obj).encode())
    except BadRecord as bad:
        assert str(bad)


def test_pairs_of_a_source_row_become_a_task_with_the_last_pair_as_test():
    row = {"source": "s1", "examples": [[GRID, GRID], [GRID, [[5]]], [[[7]], GRID]], "seeds": []}
    expected = {
        "task_id": "s1",
        "train": [PAIR, {"input": GRID, "output": [[5]]}],
        "test": [{"input": [[7]], "output": GRID}],
    }
    assert task_from_row(row, "examples", "row-0") == expected
    arrays = [tuple(np.array(grid, np.int8) for grid in pair) for pair in row["examples"]]
    assert task_from_row(row | {"examples": arrays}, "examples", "row-0") == expected
    named = [{"input": a, "output": b} for a, b in row["examples"]]
    assert task_from_row(row | {"examples": named}, "examples", "row-0") == expected
    assert task_from_row(row | {"examples": json.dumps(row["examples"])}, "examples", "row-0") == expected


def test_rows_that_are_tasks_or_text_already_pass():
    assert task_from_row(TASK, "examples", "row-0") == TASK
    assert task_from_row({"prompt": "hi"}, "examples", "row-3") == {"task_id": "row-3", "text": "hi"}


@pytest.mark.parametrize(
    "pairs", [[], [[GRID, GRID]], "[", [[GRID], [GRID]], [[GRID, GRID], [GRID, [[1], [2, 3]]]], None]
)
def test_unusable_pairs_are_bad_records(pairs):
    with pytest.raises(BadRecord):
        task_from_row({"examples": pairs}, "examples", "row-0")
