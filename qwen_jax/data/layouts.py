"""How a task becomes text, in segments that know what they are for and which character is which cell."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, chain
from typing import Protocol

import numpy as np

from qwen_jax.data.arc import Grid, Task
from qwen_jax.roles import ANSWER, ASSISTANT, INSTRUCTION, TEMPLATE, TEST_INPUT, THINK, TOOL, example_role


@dataclass(frozen=True)
class Words:
    """What stands around a task's grids. example: {} is its number, from 1."""

    instruction: str
    example: str
    output: str
    end: str
    test: str


_PLAIN_WORDS = Words(
    "Each example turns an input grid into an output grid by the same rule. Cells are colours, 0 to 9. "
    "Find the rule and give the output grid of the test input.\n\n",
    "Example {}\nInput:\n",
    "Output:\n",
    "\n",
    "Test\nInput:\n",
)
_NAMED_WORDS = replace(
    _PLAIN_WORDS,
    instruction="Each example turns an input grid into an output grid by the same rule. Cells are named by their "
    "colours. Find the rule and give the output grid of the test input.\n\n",
)
_SECTIONS = Words(
    "Several examples of one transformation of grids follow, each with its input and its output. Work out what the "
    "transformation does to every input, then apply it to the test's input and write the output in the same form.\n\n",
    "### Example {}\n\n#### Input\n\n",
    "\n#### Output\n\n",
    "\n",
    "### Test\n\n#### Input\n\n",
)
_DIGITS = tuple("0123456789")
_TO_DIGITS = bytes.maketrans(bytes(range(10)), b"0123456789")
_NAMES = ("black", "blue", "red", "green", "yellow", "grey", "magenta", "orange", "cyan", "brown")


@dataclass(frozen=True)
class Segment:
    """A part of a prompt. role: its code in qwen_jax/roles.py.

    cells: for a segment that shows a grid, gives int32 [n_cells, 6]: where in `text` each cell begins and ends, and
    the cell's grid, row, column and colour. A prompt that turns out too long is never asked for them.
    """

    role: int
    text: str
    cells: Callable[[], np.ndarray] | None = None


class PromptFormat(Protocol):
    """How a task becomes text."""

    def segments(self, task: Task, dropped: int = 0) -> list[Segment]:
        """The prompt without the task's first `dropped` examples. Of several test inputs the first is asked for."""
        ...

    def answer(self, task: Task) -> Segment | None:
        """The first test's output as the prompt would go on with it; None where the task has none."""
        ...

    def read(self, text: str) -> Grid | None:
        """The grid that an answer in this format begins with; None where it begins with none."""
        ...

    def least_characters(self, task: Task) -> list[int]:
        """The fewest characters that each example takes in a prompt, and last those of the test."""
        ...


@dataclass(frozen=True)
class GridLayout:
    """Words around grids, and how a grid becomes text: `before`, the rows, each a `row_start` and its cells, with
    `row_end` behind each, `after`. symbols: of the ten colours. shape: whether a line says a grid's height and width
    before it."""

    row_start: Callable[[int], str]
    between_cells: str
    row_end: str
    before: str = ""
    after: str = ""
    symbols: tuple[str, ...] = _DIGITS
    words: Words = _PLAIN_WORDS
    shape: bool = False

    def segments(self, task: Task, dropped: int = 0) -> list[Segment]:
        words = self.words
        segments = [Segment(INSTRUCTION, words.instruction)]
        for number, pair in enumerate(task.train[dropped:], 1):
            example = dropped + number
            segments.append(Segment(INSTRUCTION, words.example.format(number)))
            segments.append(self.show(example_role(example, "input"), 2 * example - 2, pair["input"]))
            segments.append(Segment(INSTRUCTION, words.output))
            segments.append(self.show(example_role(example, "output"), 2 * example - 1, pair["output"]))
            segments.append(Segment(INSTRUCTION, words.end))
        segments.append(Segment(INSTRUCTION, words.test))
        segments.append(self.show(TEST_INPUT, 2 * len(task.train), task.test[0]["input"]))
        segments.append(Segment(INSTRUCTION, words.output))
        return segments

    def answer(self, task: Task) -> Segment | None:
        output = task.test[0].get("output")
        return None if output is None else self.show(ANSWER, 2 * len(task.train) + 1, output)

    def read(self, text: str) -> Grid | None:
        text = text.lstrip()
        if self.shape:
            _, _, text = text.partition("\n")
        text = text.removeprefix(self.before.lstrip())
        symbol = "|".join(map(re.escape, sorted(self.symbols, key=len, reverse=True)))
        cells = f"((?:{symbol})(?:{re.escape(self.between_cells)}(?:{symbol}))*)"
        rows: Grid = []
        # The last row of an answer may end with the answer.
        while found := re.match(
            f"{re.escape(self.row_start(len(rows)))}{cells}(?:{re.escape(self.row_end)}|$)", text
        ):
            rows.append([self.symbols.index(each) for each in re.findall(symbol, found[1])])
            text = text[found.end() :]
        return rows if rows and len(set(map(len, rows))) == 1 else None

    def least_characters(self, task: Task) -> list[int]:
        headings = len(self.words.example.format(1) + self.words.output + self.words.end)
        return [
            *(headings + sum(map(self.characters, (pair["input"], pair["output"]))) for pair in task.train),
            self.characters(task.test[0]["input"]),
        ]

    def show(self, role: int, number: int, grid: Grid) -> Segment:
        """The grid's text and cells. number: the grid's number in its task (TokenizedSample.token_cells)."""
        colours = bytes(chain.from_iterable(grid))
        heads = [self.row_end + self.row_start(row) for row in range(len(grid))]
        heads[0] = self._before(grid) + self.row_start(0)
        rows = self._rows(colours, len(grid[0]))
        text = "".join(chain.from_iterable(zip(heads, rows, strict=True))) + self.row_end + self.after
        return Segment(role, text, partial(self._cells, number, heads, colours))

    def _before(self, grid: Grid) -> str:
        return f"{len(grid)} x {len(grid[0])}\n{self.before}" if self.shape else self.before

    def _rows(self, colours: bytes, width: int) -> list[str]:
        """Each row's cells."""
        shown: Sequence[str]
        if self.symbols == _DIGITS:  # at once, since a stream has some hundred million cells
            shown = colours.translate(_TO_DIGITS).decode()
        else:
            shown = [self.symbols[colour] for colour in colours]
        rows = [shown[first : first + width] for first in range(0, len(colours), width)]
        if isinstance(shown, str) and not self.between_cells:
            return [str(row) for row in rows]
        return [self.between_cells.join(row) for row in rows]

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Of the symbols; one entry where they have the same."""
        lengths = np.array([len(symbol) for symbol in self.symbols])
        return lengths[:1] if len(set(lengths.tolist())) == 1 else lengths

    def _cell_lengths(self, colours: np.ndarray) -> np.ndarray:
        """[rows or 1, columns]"""
        if len(self._lengths) == 1:
            return np.full((1, colours.shape[1]), self._lengths[0])
        return self._lengths[colours]

    def characters(self, grid: Grid) -> int:
        """Of its text."""
        height, width = len(grid), len(grid[0])
        if len(self._lengths) == 1:
            cells = height * width * int(self._lengths[0])
        else:
            cells = int(self._lengths[list(chain.from_iterable(grid))].sum())
        between = height * ((width - 1) * len(self.between_cells) + len(self.row_end))
        heads = sum(len(self.row_start(number)) for number in range(height))
        return len(self._before(grid)) + heads + cells + between + len(self.after)

    def _cells(self, number: int, heads: list[str], colours_of_cells: bytes) -> np.ndarray:
        """As Segment has them. heads: what stands before each row."""
        colours = np.frombuffer(colours_of_cells, np.uint8).reshape(len(heads), -1)
        lengths, separator = self._cell_lengths(colours), len(self.between_cells)
        ends = np.cumsum(lengths + separator, axis=1)  # in its row, with what separates it from the next cell
        row_lengths = np.broadcast_to(ends[:, -1] - separator, len(heads))
        starts = np.cumsum([len(head) for head in heads]) + np.cumsum(row_lengths) - row_lengths
        cells = np.empty((*colours.shape, 6), np.int32)
        cells[..., 1] = starts[:, None] + ends - separator
        cells[..., 0] = cells[..., 1] - lengths
        cells[..., 2] = number
        cells[..., 3] = np.arange(len(heads))[:, None]
        cells[..., 4] = np.arange(colours.shape[1])
        cells[..., 5] = colours
        return cells.reshape(-1, 6)


def _no_start(row: int) -> str:
    return ""


# Rows numbered from 1. Qwen's tokenizer makes every digit a token, so a cell is one token.
_FENCED_ROWS = GridLayout(lambda row: f"{row + 1}: ", "", "\n", before="```\n", after="```\n")

PROMPT_FORMATS: dict[str, PromptFormat] = {
    "rows": _FENCED_ROWS,
    "plain": GridLayout(_no_start, "", "\n"),
    "json": GridLayout(lambda row: ",[" if row else "[", ",", "]", before="[", after="]\n"),
    "delimited": GridLayout(_no_start, "", "|", after="\n"),
    "spaced": GridLayout(_no_start, " ", "\n"),
    "names": GridLayout(_no_start, " ", "\n", symbols=_NAMES, words=_NAMED_WORDS),
    "output_from_examples": replace(_FENCED_ROWS, words=_SECTIONS, shape=True),
}
"""By name."""


_NOWHERE = np.iinfo(np.int32).max


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
        """int32 [n, 4]: grid, row, column, colour of the cell of which a token shows all or a part; -1 where it shows
        none or several. None without grids."""
        cells = self._cells()
        if cells is None:
            return None
        # The first cell that ends behind the token's start: the token's if the token reaches it, and not the next.
        first = np.searchsorted(cells[:, 1], spans[:, 0], side="right")
        starts = np.append(cells[:, 0], [_NOWHERE, _NOWHERE])
        holds_one = (starts[first] < spans[:, 1]) & (starts[first + 1] >= spans[:, 1])
        return np.where(holds_one[:, None], cells[first.clip(max=len(cells) - 1), 2:], np.int32(-1))

    def _cells(self) -> np.ndarray | None:
        """Those of the segments, their spans counted from the prompt's start."""
        shown = [number for number, segment in enumerate(self._segments) if segment.cells is not None]
        if not shown:
            return None
        cells = [segment.cells() for segment in self._segments if segment.cells is not None]
        joined = np.concatenate(cells)
        joined[:, :2] += np.repeat(self._starts[shown], [len(each) for each in cells])[:, None]
        return joined


def place_in_template(render: Callable[[list[str]], str], contents: Sequence[list[Segment]]) -> list[Segment]:
    """The segments of a chat template's text: the messages' own where they stand in it, template around them.

    render: from the messages' contents to the template's text, which may leave some out. A text that is not made of the
    contents, or of the contents without blanks at their ends, is template throughout.
    """
    texts = ["".join(segment.text for segment in segments) for segments in contents]
    rendered = render(texts)
    marks = [f"[content {number}]" for number in range(len(texts))]
    marked = render(marks)
    there = [number for number, mark in enumerate(marks) if mark in marked]
    around = _split(marked, [marks[number] for number in there])
    for strip in (False, True):
        placed = [Segment(TEMPLATE, around[0])]
        for number, template in zip(there, around[1:], strict=True):
            text, segments = texts[number], contents[number]
            inside = text.strip() if strip else text
            start = text.find(inside)
            placed += [*_cut(segments, start, start + len(inside)), Segment(TEMPLATE, template)]
        if "".join(segment.text for segment in placed) == rendered:
            return placed
    return [Segment(TEMPLATE, rendered)]


_TAGS = {"think": THINK, "tools": TOOL, "tool_call": TOOL, "tool_response": TOOL}
_TAGGED = re.compile(rf"<({'|'.join(_TAGS)})>.*?</\1>", re.DOTALL)


def tagged(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The same text, in which what the template or the assistant puts between tags of reasoning and of tools has a role
    of its own."""
    for segment in segments:
        start = 0
        for found in _TAGGED.finditer(segment.text) if segment.role in (TEMPLATE, ASSISTANT) else ():
            yield Segment(segment.role, segment.text[start : found.start()])
            yield Segment(_TAGS[found[1]], found[0])
            start = found.end()
        yield Segment(segment.role, segment.text[start:]) if start else segment


def _split(text: str, marks: Iterable[str]) -> list[str]:
    """What stands before, between and after the marks, each of which is there; one that comes out of order leaves
    nothing after it."""
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
    inside = found[(found[:, 0] >= first) & (found[:, 1] <= last)]
    return inside - np.array([first, first, 0, 0, 0, 0], np.int32)
