"""A bar for whoever waits at a terminal."""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def with_bar(items: Iterable[T], total: int, unit: str = "shard") -> Iterable[T]:
    """The items; where stderr is a terminal, and tqdm is installed, a bar counts them."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # reading needs three packages, and tqdm is none of them
        return items
    return tqdm(items, total=total, unit=unit, disable=None, leave=False)
