"""Which of a test's parameters the default suite takes."""

from collections.abc import Iterable

import pytest


def few(parameters: Iterable, count: int = 1) -> list:
    """The first of them as they are; the others are left to `tests/run -m wide`. A tuple is a test's arguments."""
    every = (each if isinstance(each, tuple) else (each,) for each in parameters)
    return [
        pytest.param(*each, marks=[pytest.mark.wide] if place >= count else [])
        for place, each in enumerate(every)
    ]
