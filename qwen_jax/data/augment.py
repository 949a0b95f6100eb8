"""Other views of an ARC task: a symmetry of its grids, other colours, its examples in another order; and the way back.

A view is written down as a small JSON string, from which each of its cells is found again in the task itself.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qwen_jax.data.arc import BadRecord, Grid, parse_json

if TYPE_CHECKING:
    import numpy as np

_COLOURS = 10


def _transposed(grid: Grid) -> Grid:
    return [list(column) for column in zip(*grid, strict=True)]


def _mirrored(grid: Grid) -> Grid:
    return [row[::-1] for row in grid]


SYMMETRIES: dict[str, Callable[[Grid], Grid]] = {
    "identity": lambda grid: grid,
    "rotate_90": lambda grid: _transposed(grid[::-1]),
    "rotate_180": lambda grid: _mirrored(grid[::-1]),
    "rotate_270": lambda grid: _transposed(grid)[::-1],
    "flip": lambda grid: grid[::-1],
    "mirror": _mirrored,
    "transpose": _transposed,
    "antitranspose": lambda grid: _mirrored(_transposed(grid)[::-1]),
}
"""Of a square, by name; rotations go clockwise, `flip` turns the rows' order around and `mirror` the columns'."""


@dataclass(frozen=True)
class Augmentation:
    """A view of a task.

    symmetry: of SYMMETRIES. colours: what each colour of the task became. examples: for each example of the view its
    place in the task, from 0. sizes: height and width of each grid of the task, in the order of token_cells.
    """

    symmetry: str
    colours: list[int]
    examples: list[int]
    sizes: list[list[int]]

    @classmethod
    def drawn(cls, task: Mapping[str, Any], seed: str, keep_black: bool) -> "Augmentation":
        """task: a stream line's `train` and `test`. keep_black: colour 0 stays itself."""
        rng = random.Random(seed)
        symmetry = rng.choice(list(SYMMETRIES))
        moving = list(range(keep_black, _COLOURS))
        colours = [0] * keep_black + rng.sample(moving, len(moving))
        examples = rng.sample(range(len(task["train"])), len(task["train"]))
        pairs = (*task["train"], task["test"][0])
        grids = [pair[side] for pair in pairs for side in ("input", "output") if side in pair]
        return cls(symmetry, colours, examples, [[len(grid), len(grid[0])] for grid in grids])

    @classmethod
    def parse(cls, text: str) -> "Augmentation":
        """The reverse of str(); raises BadRecord."""
        try:
            found = cls(**parse_json(text))
            fits = sorted(found.colours) == list(range(_COLOURS)) and found.symmetry in SYMMETRIES
            fits = fits and sorted(found.examples) == list(range(len(found.examples)))
            fits = fits and all(
                1 <= size <= 1000 for height, width in found.sizes for size in (height, width)
            )
            fits = fits and len(found.sizes) - 2 * len(found.examples) in (1, 2)
        except (TypeError, ValueError) as error:
            raise BadRecord(f"augmentation {text[:40]!r} cannot be read") from error
        if not fits:
            raise BadRecord(f"augmentation {text[:40]!r} is none of a task")
        return found

    def __str__(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    def applied(self, task: Mapping[str, Any]) -> dict[str, Any]:
        train = [self._pair(task["train"][number]) for number in self.examples]
        return {**task, "train": train, "test": [self._pair(pair) for pair in task["test"]]}

    def _pair(self, pair: Mapping[str, Grid]) -> dict[str, Grid]:
        turned = SYMMETRIES[self.symmetry]
        return {
            side: turned([[self.colours[colour] for colour in row] for row in grid])
            for side, grid in pair.items()
        }

    def undo(self, cells: "np.ndarray") -> "np.ndarray":
        """The cells of the task that those of the view are. cells: int32 [n, 4], as token_cells; -1 stays -1."""
        import numpy as np  # a fleet's control machine, which asks for streams' names, may not have it

        undone = cells.copy()
        for grid in np.unique(cells[cells[:, 0] >= 0, 0]).tolist():
            here = cells[:, 0] == grid
            original = self._grid(grid)
            height, width = self.sizes[original]
            origins = np.array(
                SYMMETRIES[self.symmetry](np.arange(height * width).reshape(height, width).tolist())
            )
            rows, columns = np.divmod(origins[cells[here, 1], cells[here, 2]], width)
            colours = np.argsort(self.colours)[cells[here, 3]]
            undone[here] = np.stack([np.full_like(rows, original), rows, columns, colours], axis=1)
        return undone

    def _grid(self, number: int) -> int:
        """A grid's number in the task, of its number in the view."""
        example, side = divmod(number, 2)
        return 2 * self.examples[example] + side if example < len(self.examples) else number


def undo_cells(cells: "np.ndarray", augmentation: str | None) -> "np.ndarray":
    """A sample's `token_cells` as they would be in the task itself, so that the same cell can be found in all views of
    it. augmentation: the sample's, None where it has none. Raises BadRecord for one that cannot be read."""
    return cells if augmentation is None else Augmentation.parse(augmentation).undo(cells)
