"""A prompt format of the user's own: a Jinja template in a file, run in a sandbox, in which cells are found again.

The template gets `train`, a list of pairs with `input` and `output`, and `test_input`. A grid is a list of rows of
cells; a cell is a number that shows itself as its digit, or as another text with the filter `shown`. A grid as a whole
shows its rows of digits.
"""

import re
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.data.arc import Grid, Task
from qwen_jax.data.layouts import GridLayout, Segment
from qwen_jax.errors import ConfigError, UsageError
from qwen_jax.roles import ANSWER, INSTRUCTION, TEST_INPUT, example_role

SUFFIX = ".jinja"
_MARKED = re.compile("\ue000([0-9]+)\ue001([^\ue002]*)\ue002")
_ROWS = GridLayout(lambda row: "", "", "\n")
_PROBE = Task("", [{"input": [[1, 2]], "output": [[3]]}], [{"input": [[4, 5], [6, 7]]}])


class _Cell(int):
    """A colour that says where it stands when it is shown. number: in the list of a prompt's cells."""

    number: int

    def __str__(self) -> str:
        return _shown(self, format(int(self), "d"))


def _shown(cell: _Cell, text: object) -> str:
    """A cell's text between marks, by which it is found in what the template gives."""
    return f"\ue000{cell.number}\ue001{text}\ue002"


class _Grid(list):
    def __str__(self) -> str:
        return "".join("".join(map(str, row)) + "\n" for row in self)


class _Cells:
    """Makes the cells of one prompt; known: of each its grid, row, column and colour, and its grid's role."""

    def __init__(self) -> None:
        self.known: list[tuple[int, int, int, int, int]] = []

    def of(self, role: int, number: int, grid: Grid) -> _Grid:
        return _Grid(
            [self._cell(role, number, row, column, colour) for column, colour in enumerate(colours)]
            for row, colours in enumerate(grid)
        )

    def _cell(self, role: int, number: int, row: int, column: int, colour: int) -> _Cell:
        cell = _Cell(colour)
        cell.number = len(self.known)
        self.known.append((role, number, row, column, colour))
        return cell


class TemplateFormat:
    """A PromptFormat (layouts.py) from a file."""

    def __init__(self, path: Path):
        """Raises UsageError for what is no template, or shows no test input."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        )
        environment.filters["shown"] = _shown
        self._path, self._error = path, TemplateError
        try:
            self._template = environment.from_string(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TemplateError) as error:
            raise UsageError(f"--prompt_format {path} cannot be read as a template: {error}") from error
        found = [
            cell for segment in self.segments(_PROBE) if segment.cells for cell in segment.cells().tolist()
        ]
        if [colour for *_, number, _, _, colour in found if number == 2] != [4, 5, 6, 7]:
            raise UsageError(
                f"--prompt_format {path} does not show every cell of the test input once: show test_input, or its cells"
            )

    def segments(self, task: Task, dropped: int = 0) -> list[Segment]:
        """Raises ConfigError where the template fails."""
        cells = _Cells()
        train = [
            {
                side: cells.of(example_role(number, side), 2 * number - 2 + second, pair[side])
                for second, side in enumerate(("input", "output"))
            }
            for number, pair in enumerate(task.train[dropped:], dropped + 1)
        ]
        test_input = cells.of(TEST_INPUT, 2 * len(task.train), task.test[0]["input"])
        return list(_segments(self._rendered(train=train, test_input=test_input), cells))

    def answer(self, task: Task) -> Segment | None:
        output = task.test[0].get("output")
        return None if output is None else _ROWS.show(ANSWER, 2 * len(task.train) + 1, output)

    def read(self, text: str) -> Grid | None:
        return _ROWS.read(text)

    def least_characters(self, task: Task) -> list[int]:
        """As if every cell were shown, by one character."""
        examples = [sum(len(grid) * len(grid[0]) for grid in pair.values()) for pair in task.train]
        grid = task.test[0]["input"]
        return [*examples, len(grid) * len(grid[0])]

    def _rendered(self, **values: Any) -> str:
        try:
            return self._template.render(**values)
        except (self._error, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ConfigError(f"--prompt_format {self._path}: {type(error).__name__}: {error}") from error


def _segments(rendered: str, cells: _Cells) -> Iterator[Segment]:
    """The parts of a rendered text: from a grid's first cell to its last one, and what stands around them."""
    cells_found = [(int(found[1]), found) for found in _MARKED.finditer(rendered)]
    start = 0
    for role, group in groupby(cells_found, key=lambda each: cells.known[each[0]][0]):
        shown = list(group)
        first, last = shown[0][1].start(), shown[-1][1].end()
        if rendered[start:first]:
            yield Segment(INSTRUCTION, rendered[start:first])
        yield _grid_segment(role, rendered[first:last], cells)
        start = last
    if rendered[start:]:
        yield Segment(INSTRUCTION, rendered[start:])


def _grid_segment(role: int, marked: str, cells: _Cells) -> Segment:
    parts = _MARKED.split(marked)  # text, number, cell's text, text, number, ...
    texts = list(chain.from_iterable(zip(parts[::3], [*parts[2::3], ""], strict=True)))
    spans = np.cumsum([len(text) for text in texts]).reshape(-1, 2)[:-1]
    known = np.array([cells.known[int(number)][1:] for number in parts[1::3]], np.int32)
    found = np.column_stack([spans, known]).astype(np.int32)
    return Segment(role, "".join(texts), lambda: found)


def read_template(name: str) -> TemplateFormat:
    """name: a path that ends in SUFFIX."""
    return TemplateFormat(Path(name).expanduser())
