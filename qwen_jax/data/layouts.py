"""How a task becomes text, in segments that know what they are for and which character is which cell."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain

import numpy as np

from qwen_jax.data.arc import Grid, Task
from qwen_jax.roles import ANSWER, INSTRUCTION, TEMPLATE, TEST_INPUT, example_role

_INSTRUCTION = (
    "Each example turns an input grid into an output grid by the same rule. Cells are colours, 0 to 9. "
    "Find the rule and give the output grid of the test input.\n\n"
)
_EXAMPLE, _OUTPUT, _END = "Example {}\nInput:\n", "Output:\n", "\n"
# The digit of every colour, as bytes.translate takes it.
_DIGITS = bytes.maketrans(bytes(range(10)), b"0123456789")


@dataclass(frozen=True)
class Segment:
    """A part of a prompt. role: its code in qwen_jax/roles.py.

    cells: for a segment that shows a grid, gives int32 [n_cells, 5]: where in `text` each cell's digit stands, and
    the cell's grid, row, column and colour. A prompt that turns out too long is never asked for them.
    """

    role: int
    text: str
    cells: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class GridLayout:
    """How a grid becomes text: `before`, each row between its `row_start` and `row_end`, `after`."""

    row_start: Callable[[int], str]
    between_cells: str
    row_end: str
    before: str = ""
    after: str = ""

    def show(self, role: int, number: int, grid: Grid) -> Segment:
        """The grid's text and cells. number: the grid's number in its task (TokenizedSample.token_cells)."""
        height, width = len(grid), len(grid[0])
        colours = bytes(chain.from_iterable(grid))
        digits = colours.translate(_DIGITS).decode()
        rows = [digits[first : first + width] for first in range(0, len(digits), width)]
        if self.between_cells:
            rows = [self.between_cells.join(row) for row in rows]
        heads = [self.row_end + self.row_start(row) for row in range(height)]
        heads[0] = self.before + self.row_start(0)
        text = "".join(chain.from_iterable(zip(heads, rows, strict=True))) + self.row_end + self.after
        return Segment(role, text, partial(self._cells, number, heads, colours, len(rows[0])))

    def characters(self, grid: Grid) -> int:
        """Of its text."""
        height, width = len(grid), len(grid[0])
        row = width + (width - 1) * len(self.between_cells) + len(self.row_end)
        heads = sum(len(self.row_start(number)) for number in range(height))
        return len(self.before) + heads + height * row + len(self.after)

    def _cells(self, number: int, heads: list[str], colours: bytes, row_length: int) -> np.ndarray:
        """As Segment has them. heads: what stands before each row, row_length: its characters without that."""
        rows, columns = np.arange(len(heads)), np.arange(len(colours) // len(heads))
        starts = np.cumsum([len(head) for head in heads]) + rows * row_length
        cells = np.empty((len(rows), len(columns), 5), np.int32)
        cells[..., 0] = starts[:, None] + columns * (1 + len(self.between_cells))
        cells[..., 1] = number
        cells[..., 2] = rows[:, None]
        cells[..., 3] = columns
        cells[..., 4] = np.frombuffer(colours, np.uint8).reshape(cells.shape[:2])
        return cells.reshape(-1, 5)


# Rows numbered from 1. Qwen's tokenizer makes every digit a token, so a cell is one token.
_FENCED_ROWS = GridLayout(lambda row: f"{row + 1}: ", "", "\n", before="```\n", after="```\n")
_PLAIN_ROWS = GridLayout(lambda row: "", "", "\n")
_JSON_ROWS = GridLayout(lambda row: ",[" if row else "[", ",", "]", before="[", after="]\n")


PROMPT_FORMATS: dict[str, GridLayout] = {"rows": _FENCED_ROWS, "plain": _PLAIN_ROWS, "json": _JSON_ROWS}
"""How a prompt shows grids, by name."""


def task_segments(task: Task, layout: GridLayout, dropped: int = 0) -> list[Segment]:
    """The prompt of a task without its first `dropped` examples. Of several test inputs the first is asked for."""
    segments = [Segment(INSTRUCTION, _INSTRUCTION)]
    for number, pair in enumerate(task.train[dropped:], 1):
        example = dropped + number
        segments.append(Segment(INSTRUCTION, _EXAMPLE.format(number)))
        segments.append(layout.show(example_role(example, "input"), 2 * example - 2, pair["input"]))
        segments.append(Segment(INSTRUCTION, _OUTPUT))
        segments.append(layout.show(example_role(example, "output"), 2 * example - 1, pair["output"]))
        segments.append(Segment(INSTRUCTION, _END))
    segments.append(Segment(INSTRUCTION, "Test\nInput:\n"))
    segments.append(layout.show(TEST_INPUT, 2 * len(task.train), task.test[0]["input"]))
    segments.append(Segment(INSTRUCTION, _OUTPUT))
    return segments


def least_characters(task: Task, layout: GridLayout) -> list[int]:
    """The fewest characters that each example takes in a prompt, and last those of the test."""
    headings = len(_EXAMPLE.format(1) + _OUTPUT + _END)
    return [
        *(headings + sum(map(layout.characters, (pair["input"], pair["output"]))) for pair in task.train),
        layout.characters(task.test[0]["input"]),
    ]


def answer_segment(task: Task, layout: GridLayout) -> Segment | None:
    """The first test's output as the prompt would go on with it; None where the task has none."""
    output = task.test[0].get("output")
    return None if output is None else layout.show(ANSWER, 2 * len(task.train) + 1, output)


class Prompt:
    """A prompt's text, and what each character of it is for."""

    def __init__(self, segments: Iterable[Segment]):
        self._segments = list(segments)
        self.text = "".join(segment.text for segment in self._segments)
        lengths = (len(segment.text) for segment in self._segments[:-1])
        self._starts = np.fromiter(accumulate(lengths, initial=0), np.int32, len(self._segments))
        self._roles = np.fromiter((segment.role for segment in self._segments), np.int32, len(self._segments))

    def starts(self, roles: Sequence[int]) -> np.ndarray | None:
        """int32 [n]: where the first segment of each role starts; None unless all are there."""
        first: dict[int, int] = {}
        for role, start in zip(self._roles.tolist(), self._starts.tolist(), strict=True):
            first.setdefault(role, start)
        return np.array([first[role] for role in roles], np.int32) if first.keys() >= set(roles) else None

    def token_roles(self, spans: np.ndarray) -> np.ndarray:
        """int32 [n]: the role of each token's first character. spans: [n, 2], first character and end."""
        segment = np.searchsorted(self._starts, spans[:, 0], side="right") - 1
        return self._roles[segment]

    def token_cells(self, spans: np.ndarray) -> np.ndarray | None:
        """int32 [n, 4]: grid, row, column, colour of the cell that a token is, else -1; None without grids."""
        cells = self._cells()
        if cells is None:
            return None
        place = np.searchsorted(cells[:, 0], spans[:, 0]).clip(max=len(cells) - 1)
        is_cell = (cells[place, 0] == spans[:, 0]) & (spans[:, 1] - spans[:, 0] == 1)
        return np.where(is_cell[:, None], cells[place, 1:], np.int32(-1))

    def _cells(self) -> np.ndarray | None:
        """Those of the segments, their places counted from the prompt's start."""
        shown = [number for number, segment in enumerate(self._segments) if segment.cells is not None]
        if not shown:
            return None
        cells = [segment.cells() for segment in self._segments if segment.cells is not None]
        joined = np.concatenate(cells)
        joined[:, 0] += np.repeat(self._starts[shown], [len(each) for each in cells])
        return joined


def place_in_template(render: Callable[[list[str]], str], contents: Sequence[list[Segment]]) -> list[Segment]:
    """The segments of a chat template's text: the messages' own where they stand in it, template around them.

    render: from the messages' contents to the template's text. A text that is not made of the contents, or of the
    contents without blanks at their ends, is template throughout.
    """
    texts = ["".join(segment.text for segment in segments) for segments in contents]
    rendered = render(texts)
    marks = [f"[content {number}]" for number in range(len(texts))]
    around = _split(render(marks), marks)
    for strip in (False, True):
        placed = [Segment(TEMPLATE, around[0])]
        for text, segments, template in zip(texts, contents, around[1:], strict=True):
            inside = text.strip() if strip else text
            start = text.find(inside)
            placed += [*_cut(segments, start, start + len(inside)), Segment(TEMPLATE, template)]
        if "".join(segment.text for segment in placed) == rendered:
            return placed
    return [Segment(TEMPLATE, rendered)]


def _split(text: str, marks: Iterable[str]) -> list[str]:
    """What stands before, between and after the marks; a mark that is not there leaves nothing after it."""
    parts = []
    for mark in marks:
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def _cut(segments: Iterable[Segment], start: int, stop: int) -> list[Segment]:
    """The characters from `start` to `stop` of the segments' joined text."""
    kept = []
    for segment in segments:
        first, last = max(start, 0), min(stop, len(segment.text))
        if first < last:
            kept.append(_part(segment, first, last))
        start, stop = start - len(segment.text), stop - len(segment.text)
    return kept


def _part(segment: Segment, first: int, last: int) -> Segment:
    if last - first == len(segment.text):
        return segment
    cells = None if segment.cells is None else partial(_cells_between, segment.cells, first, last)
    return Segment(segment.role, segment.text[first:last], cells)


def _cells_between(cells: Callable[[], np.ndarray], first: int, last: int) -> np.ndarray:
    found = cells()
    return found[(found[:, 0] >= first) & (found[:, 0] < last)] - np.array([first, 0, 0, 0, 0], np.int32)
