#!/usr/bin/env python3
"""Writes examples/demo/streams: 96 small ARC-like tasks of six kinds. The same bytes each time.

Run from the repository's root: python -m examples.demo.make_stream
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.data.arc import Grid
from qwen_jax.data.streams import write_streams

DEMO = Path(__file__).parent
TASKS_PER_KIND = 16
PAIRS_PER_TASK = 3
SIDE = 3


def random_grid(rng: random.Random, colours: int = 4) -> Grid:
    return [[rng.choice([0, 0, *range(1, colours)]) for _ in range(SIDE)] for _ in range(SIDE)]


def copy(grid: Grid, rng: random.Random) -> Grid:
    return [list(row) for row in grid]


def mirror(grid: Grid, rng: random.Random) -> Grid:
    return [row[::-1] for row in grid]


def turn(grid: Grid, rng: random.Random) -> Grid:
    return [list(column) for column in zip(*grid[::-1], strict=True)]


def recolour(grid: Grid, rng: random.Random) -> Grid:
    old, new = rng.randint(1, 3), rng.randint(4, 9)
    return [[new if cell == old else cell for cell in row] for row in grid]


def shift(grid: Grid, rng: random.Random) -> Grid:
    steps = rng.randint(1, 2)
    return [[0] * steps + row[:-steps] for row in grid]


def count(grid: Grid, rng: random.Random) -> Grid:
    """A bar as long as the number of cells of colour 1, at least one cell."""
    ones = sum(row.count(1) for row in grid)
    return [[1] * max(ones, 1)]


KINDS: dict[str, Callable[[Grid, random.Random], Grid]] = {
    rule.__name__: rule for rule in (copy, mirror, recolour, shift, turn, count)
}
TRAINED = ("copy", "shift", "count")
"""Kinds that the demo's model has seen (train_model.py); the others show what it makes of what it does not know."""


def make_task(kind: str, number: int, count: int = PAIRS_PER_TASK) -> dict:
    """A task in the shape of ARC's own: train pairs, one test pair, a name. Its number is the seed."""
    pairs = []
    for pair in range(count):
        grid = random_grid(random.Random(f"{kind}-{number}-{pair}"))
        # The rule's own choices belong to the task, so every pair draws the same ones.
        pairs.append({"input": grid, "output": KINDS[kind](grid, random.Random(f"{kind}-{number}"))})
    return {"task_id": f"demo-{kind}-{number:02d}", "train": pairs[:-1], "test": pairs[-1:]}


def kind_of(task_id: str) -> str:
    return task_id.split("-")[1]


def tasks(first: int = 0, count: int = TASKS_PER_KIND) -> Iterator[dict]:
    """The tasks of all kinds with the numbers from `first` on."""
    for number in range(first, first + count):
        for kind in KINDS:
            yield make_task(kind, number)


def write(folder: Path, made: Iterator[dict]) -> None:
    write_streams(enumerate(made), 1, folder, source={"dataset_name": "examples/demo/make_stream.py"})


def main(folder: Path = DEMO / "streams") -> None:
    write(folder, tasks())


if __name__ == "__main__":
    main()
