"""One source row, many stream lines: a line for each test, each view and each piece."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qwen_jax.data.augment import Augmentation
from qwen_jax.errors import UsageError

ALL_TESTS, FIRST_TEST = "all", "first"
TESTS = (ALL_TESTS, FIRST_TEST)


@dataclass(frozen=True)
class Spread:
    """tests: whether each test of a task gives a line, or the first is asked for in one that holds them all. augment:
    views of each task, the first one the task itself; seed: of the others; keep_black: colour 0 stays itself in them.
    pieces: characters of a piece of text at most, None for whole texts; overlap: those that a piece has of the one
    before."""

    tests: str = FIRST_TEST
    augment: int = 1
    seed: int = 0
    keep_black: bool = False
    pieces: int | None = None
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.pieces is not None and self.overlap >= self.pieces:
            raise UsageError(f"--overlap {self.overlap} must be less than --pieces {self.pieces}")
        if self.pieces is None and self.overlap:
            raise UsageError("--overlap needs --pieces")

    def recorded(self) -> dict[str, Any]:
        """What streams.json says of it: what is not as it is by default."""
        default = asdict(type(self)(ALL_TESTS))
        return {key: value for key, value in asdict(self).items() if value != default[key]}

    def lines(self, record: dict[str, Any], row: int) -> Iterator[dict[str, Any]]:
        """record: as arc.task_from_row gives it. row: its index, which with the seed says what views it has."""
        if "text" in record:
            yield from self._pieces(record)
        elif "train" in record:
            for of_test in self._tests(record):
                yield of_test
                for view in range(1, self.augment):
                    drawn = Augmentation.drawn(of_test, f"{self.seed} {row} {view}", self.keep_black)
                    yield _noted(drawn.applied(of_test), augmentation=str(drawn))
        else:
            yield record

    def _tests(self, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        tests = record["test"]
        if self.tests == FIRST_TEST or len(tests) == 1:
            yield record
            return
        for index, test in enumerate(tests):
            yield _noted(record | {"test": [test]}, test_index=index)

    def _pieces(self, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
        text = record["text"]
        if self.pieces is None or len(text) <= self.pieces:
            yield record
            return
        spans = list(piece_spans(text, self.pieces, self.overlap))
        for number, (start, stop) in enumerate(spans):
            piece = {"number": number, "of": len(spans), "start": start, "stop": stop}
            if text[start:stop].strip():
                yield _noted(
                    record | {"text": text[start:stop]}, piece=json.dumps(piece, separators=(",", ":"))
                )


def _noted(record: dict[str, Any], **notes: str | int) -> dict[str, Any]:
    """The record with notes behind its name."""
    return {"task_id": record["task_id"], **notes, **record}


def piece_spans(text: str, length: int, overlap: int) -> Iterator[tuple[int, int]]:
    """First character and end of each piece: of at most `length`, ending behind a blank where its second half has one,
    and beginning `overlap` characters before the end of the one before."""
    start = 0
    while len(text) - start > length:
        stop = start + length
        blank = max(text.rfind(" ", start + length // 2, stop), text.rfind("\n", start + length // 2, stop))
        stop = blank + 1 if blank >= 0 and blank + 1 > start + overlap else stop
        yield start, stop
        start = stop - overlap
    yield start, len(text)
