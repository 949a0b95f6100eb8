"""One row, many lines: each test, each view and each piece once, the same on any number of cores, and all undone."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.data import convert
from qwen_jax.data.arc import BadRecord, parse_record
from qwen_jax.data.augment import SYMMETRIES, Augmentation, undo_cells
from qwen_jax.data.convert import stream_lines
from qwen_jax.data.prompts import PromptEncoder
from qwen_jax.data.spread import Spread, piece_spans
from qwen_jax.errors import UsageError
from tests.data.test_streams import contents, create, jsonl, rows

GRID = [[1, 2, 3], [4, 0, 6]]
TASK = {
    "task_id": "t",
    "train": [{"input": GRID, "output": [[7]]}, {"input": [[8], [9]], "output": GRID}],
    "test": [{"input": [[1, 1, 2, 3]], "output": [[5]]}, {"input": [[0]]}],
}


def test_every_test_of_a_task_gets_a_line():
    first, second = Spread("all").lines(TASK, 0)
    assert [line["test_index"] for line in (first, second)] == [0, 1]
    assert [line["test"] for line in (first, second)] == [[test] for test in TASK["test"]]
    assert first["task_id"] == "t" and first["train"] == TASK["train"]
    assert list(Spread("first").lines(TASK, 0)) == [TASK]
    single = TASK | {"test": TASK["test"][:1]}
    assert list(Spread("all").lines(single, 0)) == [single]


def test_rows_of_one_test_give_the_bytes_that_they_gave(tmp_path):
    """The guide's dataset has rows of pairs, whose last one is the test."""
    source = jsonl(tmp_path / "source.jsonl", rows(9))
    create(source, tmp_path / "all", "--num_streams", "2")
    create(source, tmp_path / "first", "--num_streams", "2", "--tests", "first")
    all_tests, first = contents(tmp_path / "all"), contents(tmp_path / "first")
    assert b'"tests": "first"' in first.pop("streams.json") and b"tests" not in all_tests.pop("streams.json")
    assert all_tests == first
    assert all(b"test_index" not in lines for lines in first.values())


def cells_of(record: dict) -> list[tuple[int, ...]]:
    """Grid, row, column and colour of every cell, numbered as in token_cells."""
    grids = [
        pair[side]
        for pair in (*record["train"], record["test"][0])
        for side in ("input", "output")
        if side in pair
    ]
    return [
        (number, row, column, colour)
        for number, grid in enumerate(grids)
        for row, colours in enumerate(grid)
        for column, colour in enumerate(colours)
    ]


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_what_a_view_has_done_is_undone_cell_by_cell(symmetry):
    drawn = Augmentation.drawn(TASK, "seed", keep_black=False)
    drawn = Augmentation(symmetry, drawn.colours, [1, 0], drawn.sizes)
    view = drawn.applied(TASK)
    assert view["train"][0] != TASK["train"][1]
    shuffled = random.Random(1).sample([*cells_of(view), (-1, -1, -1, -1)], len(cells_of(view)) + 1)
    undone = undo_cells(np.array(shuffled, np.int32), str(drawn))
    assert sorted(map(tuple, undone.tolist())) == sorted([*cells_of(TASK), (-1, -1, -1, -1)])
    some = np.array(cells_of(view)[::5], np.int32)  # of kept tokens there may be few
    assert set(map(tuple, undo_cells(some, str(drawn)).tolist())) <= set(cells_of(TASK))
    np.testing.assert_array_equal(undo_cells(some, None), some)


def test_the_eight_symmetries_are_eight():
    turned = {name: json.dumps(turn([[1, 2], [3, 4]])) for name, turn in SYMMETRIES.items()}
    assert len(set(turned.values())) == 8
    assert turned["rotate_90"] == "[[3, 1], [4, 2]]" and turned["transpose"] == "[[1, 3], [2, 4]]"


def test_the_first_view_is_the_task_and_the_others_follow_from_the_seed():
    lines = list(Spread("all", augment=5, seed=3).lines(TASK, 7))
    assert [line["test_index"] for line in lines] == [0] * 5 + [1] * 5
    assert "augmentation" not in lines[0] and all("augmentation" in line for line in lines[1:5])
    assert lines == list(Spread("all", augment=5, seed=3).lines(TASK, 7))
    assert lines[:4] == list(Spread("all", augment=4, seed=3).lines(TASK, 7))[:4]
    assert lines[1] != list(Spread("all", augment=5, seed=4).lines(TASK, 7))[1]
    assert lines[1] != list(Spread("all", augment=5, seed=3).lines(TASK, 8))[1]
    for line in lines:
        record = parse_record(line)
        assert record.notes == {key: line[key] for key in ("test_index", "augmentation") if key in line}
    colours = [Augmentation.parse(line["augmentation"]).colours for line in lines if "augmentation" in line]
    assert any(each[0] for each in colours) and all(sorted(each) == list(range(10)) for each in colours)
    kept = [
        Augmentation.parse(line["augmentation"]).colours[0]
        for line in Spread("first", augment=9, keep_black=True).lines(TASK, 0)
        if "augmentation" in line
    ]
    assert kept == [0] * 8


def test_views_have_the_same_bytes_on_any_number_of_cores(monkeypatch):
    source = [(index, TASK | {"task_id": str(index)}) for index in range(300)]

    def lines(cores: int) -> list[bytes]:
        monkeypatch.setattr(convert, "this_machines_cores", lambda: range(cores))
        return list(stream_lines(source, "examples", print, Spread("all", augment=2)))

    one = lines(1)
    assert len(one) == 1200 and one == lines(2)


def test_the_same_cell_is_found_in_the_tokens_of_every_view(demo_tokenizer):
    views = [
        PromptEncoder(demo_tokenizer, include_answer=True).encode(0, parse_record(line))
        for line in Spread("first", augment=4).lines(TASK, 2)
    ]
    found = []
    for view in views:
        cells = undo_cells(view.cells, view.notes.get("augmentation"))
        found.append(sorted(tuple(cell) for cell in cells.tolist() if cell[0] >= 0))
    assert found[0] == found[1] == found[2] == found[3] == sorted(cells_of(TASK))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        str(Augmentation("spin", list(range(10)), [0], [[1, 1]] * 3)),
        str(Augmentation("flip", [0] * 10, [0], [[1, 1]] * 3)),
        str(Augmentation("flip", list(range(10)), [1], [[1, 1]] * 3)),
        str(Augmentation("flip", list(range(10)), [0], [[1, 1]])),
        str(Augmentation("flip", list(range(10)), [0], [[1, 10**9]] * 3)),
    ],
)
def test_what_is_no_augmentation_is_said_so(text):
    with pytest.raises(BadRecord, match="augmentation"):
        undo_cells(np.zeros((1, 4), np.int32), text)


@given(st.text("ab \n", min_size=1), st.integers(1, 9), st.integers(0, 8))
def test_pieces_hold_every_character_and_know_their_place(text, length, overlap):
    if overlap >= length:
        with pytest.raises(UsageError, match="--overlap"):
            Spread(pieces=length, overlap=overlap)
        return
    spans = list(piece_spans(text, length, overlap))
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    for (start, stop), (after, _) in pairwise(spans):
        assert 0 < stop - start <= length and after == stop - overlap > start


def test_pieces_of_a_text(tmp_path):
    text = "one two three four five six"
    (tmp_path / "a.txt").write_text(text)
    create(tmp_path / "a.txt", tmp_path / "out", "--num_streams", "1", "--pieces", "12", "--overlap", "4")
    lines = [json.loads(line) for line in (tmp_path / "out" / "stream_000.jsonl").read_text().splitlines()]
    places = [json.loads(line["piece"]) for line in lines]
    assert [place["number"] for place in places] == list(range(places[0]["of"])) and len(lines) > 2
    for line, place in zip(lines, places, strict=True):
        assert line["task_id"] == "a" and line["text"] == text[place["start"] : place["stop"]]
        assert parse_record(line).notes == {"piece": line["piece"]}
    assert lines[0]["text"] == "one two "
