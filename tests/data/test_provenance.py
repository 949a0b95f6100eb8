"""Every token knows what it is part of, and which cell it is."""

import numpy as np
import pytest

from qwen_jax.data.arc import Task, Text
from qwen_jax.data.layouts import PROMPT_FORMATS
from qwen_jax.data.prompts import PromptEncoder, TokenizedSample
from qwen_jax.errors import UsageError
from qwen_jax.roles import ROLE_NAMES, RoleSet, example_role, role_name
from tests.few import few


def grids(task: Task) -> list:
    """In the order of token_cells; the answer last."""
    pairs = [pair[side] for pair in task.train for side in ("input", "output")]
    return [*pairs, task.test[0]["input"], task.test[0]["output"]]


def names(sample: TokenizedSample) -> list[str]:
    return [role_name(code) for code in sample.roles]


def drawn(sample: TokenizedSample, tokenizer, number: int) -> list[list[int]]:
    """Grid `number` as the sample's tokens and their cells say it; [] if none of its cells is there."""
    here = sample.cells[:, 0] == number
    _, rows, columns, colours = sample.cells[here].T
    digits = np.array(tokenizer.convert_tokens_to_ids(list("0123456789")))
    assert (sample.token_ids[here] == digits[colours]).all()
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows)
    grid = np.full([rows.max(initial=-1) + 1, columns.max(initial=-1) + 1], -1)
    grid[rows, columns] = colours
    return grid.tolist()


def shown(sample: TokenizedSample, tokenizer, number: int) -> list[list[str]]:
    """The text of each of a grid's cells, as its tokens say it."""
    ids: dict[tuple[int, int], list[int]] = {}
    for token, (grid, row, column, _) in zip(sample.token_ids.tolist(), sample.cells.tolist(), strict=True):
        if grid == number:
            ids.setdefault((row, column), []).append(token)
    height, width = (max(place) + 1 for place in zip(*ids, strict=True))
    return [[tokenizer.decode(ids[row, column]).strip() for column in range(width)] for row in range(height)]


DIGITS = {name: 20 if name in ("rows", "plain", "json") else 40 for name in PROMPT_FORMATS if name != "names"}
"""Formats that show digits, and every how manieth task they are tried on."""


@pytest.mark.parametrize("chat_template", [False, True])
@pytest.mark.parametrize("prompt_format", few(DIGITS, 2))
def test_every_cell_of_real_tasks(tokenizer, arc_tasks, prompt_format, chat_template):
    encoder = PromptEncoder(tokenizer, prompt_format, chat_template, 100_000, include_answer=True)
    for task in arc_tasks[chat_template :: DIGITS[prompt_format]]:
        sample = encoder.encode(0, task)
        wanted = grids(task)
        assert [drawn(sample, tokenizer, number) for number in range(len(wanted))] == wanted
        side = {
            2 * k + s: example_role(k + 1, ("input", "output")[s])
            for k in range(len(task.train))
            for s in (0, 1)
        }
        side |= {len(wanted) - 2: ROLE_NAMES.index("test_input"), len(wanted) - 1: ROLE_NAMES.index("answer")}
        is_cell = sample.cells[:, 0] >= 0
        assert [side[grid] for grid in sample.cells[is_cell, 0]] == sample.roles[is_cell].tolist()
        assert (sample.cells[~is_cell] == -1).all()


def test_every_cell_of_a_format_with_words_for_colours(tokenizer, arc_tasks):
    """Where a word is several tokens, all of them are its cell's."""
    words = ["black", "blue", "red", "green", "yellow", "grey", "magenta", "orange", "cyan", "brown"]
    encoder = PromptEncoder(tokenizer, "names", max_seq_length=100_000, include_answer=True)
    for task in arc_tasks[::100]:
        sample = encoder.encode(0, task)
        for number, grid in enumerate(grids(task)):
            assert shown(sample, tokenizer, number) == [[words[colour] for colour in row] for row in grid]
            here = sample.cells[:, 0] == number
            _, rows, columns, colours = sample.cells[here].T
            assert (np.array(grid)[rows, columns] == colours).all()


def test_roles_follow_the_prompt(tokenizer, arc_tasks):
    sample = PromptEncoder(tokenizer, chat_template=True, max_seq_length=100_000).encode(0, arc_tasks[0])
    found = list(dict.fromkeys(names(sample)))
    examples = [
        f"example_{k}_{side}" for k in range(1, len(arc_tasks[0].train) + 1) for side in ("input", "output")
    ]
    assert found == ["template", "instruction", *examples, "test_input"]
    text = {role: tokenizer.decode(sample.token_ids[[n == role for n in names(sample)]]) for role in found}
    assert text["test_input"].startswith("```\n1: ") and text["test_input"].endswith("```\n")
    assert "assistant" in text["template"] and "cells" not in text["template"].lower()


def test_dropped_examples_keep_their_numbers(tokenizer, arc_tasks):
    task = next(task for task in arc_tasks if len(task.train) == 3)
    full = PromptEncoder(tokenizer, max_seq_length=100_000).encode(0, task)
    sample = PromptEncoder(tokenizer, max_seq_length=full.full_length - 1).encode(0, task)
    assert sample.dropped_examples == 1
    assert "example_1_input" not in names(sample) and "example_3_output" in names(sample)
    assert [drawn(sample, tokenizer, n) for n in range(7)] == [[], [], *grids(task)[2:-1]]


def test_cut_prompts_keep_rows_aligned(tokenizer, arc_tasks):
    encoder = PromptEncoder(tokenizer, max_seq_length=77, overlong="truncate")
    full = PromptEncoder(tokenizer, max_seq_length=100_000).encode(0, arc_tasks[0])
    sample = encoder.encode(0, arc_tasks[0])
    assert sample.truncated and len(sample.roles) == len(sample.cells) == len(sample.token_ids) == 77
    np.testing.assert_array_equal(sample.cells, full.cells[:77])


def test_messages_and_text(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " say: user"},
        {"role": "assistant", "content": "user"},
        {"role": "user", "content": " system"},
        {"role": "user", "content": "again"},
    ]
    sample = PromptEncoder(tokenizer).encode(0, Text("", messages=messages))
    assert sample.cells is None
    parts = {}
    for name, token in zip(names(sample), sample.token_ids, strict=True):
        parts[name] = parts.get(name, "") + tokenizer.decode([token])
    wanted = {"system": "Be brief.", "user": " say: user systemagain", "assistant": "user"}
    assert {role: parts[role] for role in wanted} == wanted
    plain = PromptEncoder(tokenizer).encode(0, Text("", text="hello é 世界 👋 there"))
    assert set(names(plain)) == {"text"}


def test_an_answer_needs_an_output(tokenizer, arc_tasks):
    bare = Task("t", arc_tasks[0].train, [{"input": [[1]]}])
    sample = PromptEncoder(tokenizer, max_seq_length=100_000, include_answer=True).encode(0, bare)
    assert "answer" not in names(sample) and not len(sample.answer_positions)


def test_role_names_and_codes_are_one_to_one():
    codes = [*range(len(ROLE_NAMES)), *range(16, 40)]
    assert len({role_name(code) for code in codes}) == len(codes)
    for code in codes:
        assert RoleSet([role_name(code)]).mask(np.array(codes)).tolist() == [c == code for c in codes]
    assert RoleSet(["example_output"]).mask(np.array([16, 17, 18, 19, 7])).tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "name", ["", "Answer", "example", "example_0_input", "example_x_input", "example_1_cell"]
)
def test_no_such_role(name):
    with pytest.raises(UsageError, match="no role is called"):
        RoleSet([name])
