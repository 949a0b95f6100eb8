#!/usr/bin/env python3
"""Writes examples/demo/streams: 36 small ARC-like tasks from a handful of rules. The same bytes each time.

Run from the repository's root: python -m examples.demo.make_stream
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_jax.data.arc import Grid
from qwen_jax.data.streams import write_streams

DEMO = Path(__file__).parent
TASKS_PER_RULE = 6
PAIRS_PER_TASK = 4


def random_grid(rng: random.Random, colours: int = 4) -> Grid:
    height, width = rng.randint(3, 9), rng.randint(3, 9)
    return [[rng.choice([0, 0, *range(1, colours)]) for _ in range(width)] for _ in range(height)]


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


def double(grid: Grid, rng: random.Random) -> Grid:
    return [[cell for cell in row for _ in range(2)] for row in grid for _ in range(2)]


def count(grid: Grid, rng: random.Random) -> Grid:
    """A bar as long as the number of cells of colour 1, at least one cell."""
    ones = sum(row.count(1) for row in grid)
    return [[1] * max(ones, 1)]


RULES: dict[str, Callable[[Grid, random.Random], Grid]] = {
    rule.__name__: rule for rule in (mirror, turn, recolour, shift, double, count)
}


def tasks() -> Iterator[dict]:
    """Tasks in the shape of ARC's own: train pairs, one test pair, a name."""
    for number in range(TASKS_PER_RULE):
        for name, rule in RULES.items():
            pairs = []
            for pair in range(PAIRS_PER_TASK):
                grid = random_grid(random.Random(f"{name}-{number}-{pair}"))
                # The rule's own choices belong to the task, so every pair draws the same ones.
                pairs.append({"input": grid, "output": rule(grid, random.Random(f"{name}-{number}"))})
            yield {"task_id": f"demo-{name}-{number:02d}", "train": pairs[:-1], "test": pairs[-1:]}


def main(folder: Path = DEMO / "streams") -> None:
    write_streams(enumerate(tasks()), 1, folder, source={"dataset_name": "examples/demo/make_stream.py"})


if __name__ == "__main__":
    main()
