"""Texts and dialogues in every form are taken for what they are; what is thought and what tools say has its role."""

import csv
import gzip
import json

import pyarrow
import pytest

from qwen_jax.data.arc import BadRecord, Text, parse_record, record_from_row
from qwen_jax.data.prompts import PromptEncoder
from qwen_jax.data.sources import iter_source_rows
from qwen_jax.errors import BadDataError
from qwen_jax.roles import role_name
from tests.data.test_streams import create, jsonl

TURNS = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yes"},
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
]
ROWS = {
    "pairs": ({"examples": [[[[1]], [[2]]], [[[3]], [[4]]]]}, "examples", "pairs of grids"),
    "text": ({"body": "some words"}, "body", "texts"),
    "messages": ({"messages": MESSAGES}, "examples", "chat messages"),
    "messages of a column": ({"chat": MESSAGES}, "chat", "chat messages"),
    "ShareGPT": ({"conversations": TURNS}, "examples", "ShareGPT dialogues"),
    "ShareGPT of a column": ({"talk": TURNS}, "talk", "ShareGPT dialogues"),
    "ShareGPT, system beside": (
        {"conversations": TURNS[1:], "system": "Be brief."},
        "examples",
        "ShareGPT dialogues",
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        "examples",
        "Alpaca instructions",
    ),
}


@pytest.mark.parametrize("row, column, kind", ROWS.values(), ids=ROWS)
def test_a_row_is_taken_for_what_it_is(row, column, kind):
    found, line = record_from_row(row, column, "row-1")
    assert found == kind and line["task_id"] == "row-1"
    if "messages" in line and kind != "Alpaca instructions":
        assert line["messages"] == MESSAGES
    assert parse_record(line)


def test_columns_that_only_sound_like_ours_do_no_harm():
    row = {"text": "a", "piece": 3, "test_index": "x", "augmentation": None}
    assert record_from_row(row, "examples", "r") == ("texts", {"task_id": "r", "text": "a"})
    again = {"text": "a", "piece": "{}", "test_index": 1}
    assert record_from_row(again, "examples", "r")[1] == {
        "task_id": "r",
        "test_index": 1,
        "piece": "{}",
        "text": "a",
    }


def test_an_instruction_and_its_input_are_asked_together():
    _, line = record_from_row(ROWS["Alpaca"][0], "examples", "r")
    assert [message["content"] for message in line["messages"]] == ["Add.\n\n1 2", "3"]
    _, line = record_from_row(ROWS["Alpaca"][0] | {"input": ""}, "examples", "r")
    assert line["messages"][0]["content"] == "Add."


def test_what_rows_were_taken_for_is_shown_and_written_down(tmp_path, capsys):
    source = jsonl(
        tmp_path / "s.jsonl", [ROWS["ShareGPT"][0], ROWS["Alpaca"][0], {"text": "a"}, {"text": "b"}]
    )
    create(source, tmp_path / "out", "--num_streams", "1")
    wanted = "rows were taken for: Alpaca instructions (1), ShareGPT dialogues (1), texts (2)"
    assert wanted in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "streams.json").read_text())
    assert manifest["taken_for"] == {"Alpaca instructions": 1, "ShareGPT dialogues": 1, "texts": 2}


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [{"text": f"word {n}, with ünïcode", "task_id": f"t{n}"} for n in range(3)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl.zst").write_bytes(pyarrow.compress(data, codec="zstd", asbytes=True))
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "task_id"])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.csv"):
        found = [
            json.loads(row) if isinstance(row, bytes) else row
            for _, row in iter_source_rows(str(tmp_path / name))
        ]
        assert found == rows, name
    (tmp_path / "e.txt").write_text("a whole\n\ntext")
    assert list(iter_source_rows(str(tmp_path / "e.txt"))) == [
        (0, {"task_id": "e", "text": "a whole\n\ntext"})
    ]
    assert len(list(iter_source_rows(str(tmp_path)))) == 13


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_torn_file_is_named(tmp_path, name):
    data = b'{"text": "words"}\n' * 999
    packed = (
        gzip.compress(data) if name.endswith("gz") else pyarrow.compress(data, codec="zstd", asbytes=True)
    )
    (tmp_path / name).write_bytes(packed[:-9])
    with pytest.raises(BadDataError, match=name):
        list(iter_source_rows(str(tmp_path / name)))


def parts(sample, tokenizer) -> list[tuple[str, str]]:
    """(role, text) of the prompt's parts, in order."""
    found: list[tuple[str, str]] = []
    for role, token in zip(sample.roles.tolist(), sample.token_ids, strict=True):
        name, text = role_name(role), tokenizer.decode([token])
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1] + text)
        else:
            found.append((name, text))
    return found


def test_a_tools_words_and_what_is_thought_have_roles_of_their_own(demo_tokenizer):
    """With a template that only passes contents on."""
    messages = [
        {"role": "user", "content": "how warm?"},
        {"role": "assistant", "content": "<think>ask it</think><tool_call>warmth()</tool_call>"},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "<think>so</think>It is 21."},
    ]
    sample = PromptEncoder(demo_tokenizer).encode(0, Text("", messages=messages))
    found = [part for part in parts(sample, demo_tokenizer) if part[0] != "template"]
    assert found == [
        ("user", "how warm?"),
        ("think", "<think>ask it</think>"),
        ("tool", "<tool_call>warmth()</tool_call>"),
        ("tool", "21"),
        ("think", "<think>so</think>"),
        ("assistant", "It is 21."),
    ]


# As templates of reasoning models do: only the last answer's thoughts are shown, tools stand in the system part.
REASONING_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content and loop.last %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_a_template_shows_of_reasoning_and_tools(demo_tokenizer, monkeypatch):
    monkeypatch.setattr(demo_tokenizer, "chat_template", REASONING_TEMPLATE)
    dialogue = {
        "messages": [
            {"role": "user", "content": "how warm?"},
            {
                "role": "assistant",
                "reasoning_content": "left out",
                "content": "",
                "tool_calls": [{"name": "warmth"}],
            },
            {"role": "tool", "content": "21"},
            {"role": "assistant", "content": "<think>\nwarm\n</think>\n\nIt is 21."},
        ],
        "tools": [{"name": "warmth"}],
    }
    _, line = record_from_row(dialogue, "examples", "r")
    sample = PromptEncoder(demo_tokenizer).encode(0, parse_record(line))
    found = [part for part in parts(sample, demo_tokenizer) if part[0] != "template"]
    assert found == [
        ("tool", '<tools>[{"name": "warmth"}]</tools>'),
        ("user", "how warm?"),
        ("tool", '<tool_call>{"name": "warmth"}</tool_call>'),
        ("tool", "21"),
        ("think", "warm"),
        ("assistant", "It is 21."),
    ]
    assert "left out" not in demo_tokenizer.decode(sample.token_ids)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tools": ["x"]}, "tools"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": "x"}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "content": "", "reasoning_content": 1}]}, "reasoning_content"),
        ({"messages": [{"role": "assistant"}]}, "content is not a string"),
        ({"test_index": -1}, "test_index"),
        ({"test_index": "0"}, "test_index"),
        ({"augmentation": {"a": 1}}, "augmentation"),
        ({"piece": "x" * 100_000}, "piece"),
    ],
)
def test_fields_that_no_line_has_are_named(fields, words):
    with pytest.raises(BadRecord, match=words):
        parse_record({"messages": MESSAGES} | fields)


def test_tokens_that_a_tokenizer_puts_first_stand_before_a_text_and_not_in_a_chat(
    demo_tokenizer, monkeypatch
):
    from tokenizers.processors import TemplateProcessing

    plain = PromptEncoder(demo_tokenizer).encode(0, Text("", text="hello there"))
    chat = PromptEncoder(demo_tokenizer).encode(0, Text("", messages=MESSAGES))
    first = demo_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    backend = demo_tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", first)]
    )
    try:
        encoder = PromptEncoder(demo_tokenizer, max_seq_length=4)
        begun = encoder.encode(0, Text("", text="hello there"))
        cut = PromptEncoder(demo_tokenizer, max_seq_length=2).encode(0, Text("", text="hello there"))
        again = PromptEncoder(demo_tokenizer).encode(0, Text("", messages=MESSAGES))
    finally:
        backend.post_processor = before
    whole = [first, *plain.token_ids.tolist()]
    assert begun.token_ids.tolist() == whole[:4] and begun.full_length == len(whole)
    assert [role_name(role) for role in begun.roles[:2]] == ["template", "text"]
    assert cut.token_ids.tolist() == whole[:2] and cut.truncated
    assert again.token_ids.tolist() == chat.token_ids.tolist()
