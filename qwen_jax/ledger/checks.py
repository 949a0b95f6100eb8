"""JSON from strangers within bounds, and checks of which a table says what a file of ours holds.

A check takes a value and what to call it, and raises DamagedError for what no worker writes.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 256 << 20
"""Of a file that is read at once."""
MOST = 10**15
"""Of anything that is counted."""
_MOST_TEXT = 10_000
_MOST_DEPTH = 12
_WHOLE_BITS, _MOST_DIGITS = 64, 21
# A value takes 16 bytes and more in a file of ours, indented as it is, and about 120 bytes of memory.
_BYTES_A_VALUE, _VALUES_FREE = 16, 1_000_000

Check = Callable[[Any, str], None]


class DamagedError(ValueError):
    """A file that is empty, torn or holds what no worker writes; str says what."""


def read_bounded(path: Path) -> bytes:
    """A file's bytes, at most one more than MOST_BYTES; raises OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size  # a read takes as much memory as it is asked for
        return file.read(min(size, MOST_BYTES) + 1)


def parse_json(data: bytes) -> Any:
    """JSON in UTF-8 of bounded size, depth and numbers, in text that can be written; raises DamagedError."""
    if not data:
        raise DamagedError("empty")
    if len(data) > MOST_BYTES:
        raise DamagedError(f"more than {MOST_BYTES:,} bytes")
    if sum(map(data.count, (b",", b"[", b"{"))) > _VALUES_FREE + len(data) // _BYTES_A_VALUE:
        raise DamagedError("more values than a file of its size has")
    try:
        root = json.loads(
            data.decode(), parse_constant=_refuse_constant, parse_int=_bounded_int, parse_float=_finite_float
        )
        if b"\\u" in data:  # the only way to write half a surrogate pair, which no file can hold
            json.dumps(root, ensure_ascii=False).encode()
    except RecursionError as error:
        raise DamagedError("nested without end") from error
    except UnicodeEncodeError as error:
        raise DamagedError("it holds half a surrogate pair") from error
    except ValueError as error:
        raise DamagedError(f"not JSON such as ours ({error})") from error
    _check_depth(root)
    return root


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or (number := int(digits)).bit_length() > _WHOLE_BITS:
        raise ValueError(f"{digits:.20}... is a number of more than {_WHOLE_BITS} bits")
    return number


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits:.20} is not finite")
    return number


def _check_depth(root: Any) -> None:
    """Level by level, so that depth costs no recursion."""
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > _MOST_DEPTH:
            raise DamagedError(f"nested deeper than {_MOST_DEPTH} levels")
        level = [
            below
            for value in level
            if isinstance(value, dict | list)
            for below in (value.values() if isinstance(value, dict) else value)
        ]


def whole(least: int = 0, most: int = MOST) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise DamagedError(f"{name} is no whole number from {least} to {most}")

    return check


def number(least: float = -1e300, most: float = 1e300) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) not in (int, float) or not least <= value <= most:  # nan is not
            raise DamagedError(f"{name} is no number from {least:g} to {most:g}")

    return check


def text(form: str | None = None, most: int = _MOST_TEXT) -> Check:
    """form: what the whole text must match."""

    def check(value: Any, name: str) -> None:
        if type(value) is not str or len(value) > most or (form and not re.fullmatch(form, value)):
            raise DamagedError(f"{name} is no text such as it has to be")

    return check


def yes_or_no(value: Any, name: str) -> None:
    if type(value) is not bool:
        raise DamagedError(f"{name} is neither true nor false")


def one_of(*words: str) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) is not str or value not in words:
            raise DamagedError(f"{name} is none of {', '.join(words)}")

    return check


def plain(value: Any, name: str) -> None:
    """Anything but a list or an object."""
    if isinstance(value, list | dict):
        raise DamagedError(f"{name} is a {type(value).__name__}")


def or_null(check: Check) -> Check:
    return lambda value, name: None if value is None else check(value, name)


def list_of(check: Check, least: int = 0, most: int = MOST) -> Check:
    def check_all(value: Any, name: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise DamagedError(f"{name or 'it'} is no list of {least} to {most}")
        for index, each in enumerate(value):
            check(each, f"{name}[{index}]")

    return check_all


def distinct(check: Check, least: int = 1) -> Check:
    """A list of different ones."""

    def check_all(value: Any, name: str) -> None:
        list_of(check, least)(value, name)
        if len(set(value)) != len(value):
            raise DamagedError(f"{name} names something twice")

    return check_all


def map_of(key: Check, check: Check) -> Check:
    """An object whose keys are not known beforehand."""

    def check_all(value: Any, name: str) -> None:
        for each, below in _object(value, name).items():
            key(each, f"a key of {name}")
            check(below, f"{name}.{each:.40}")

    return check_all


def record(
    fields: Mapping[str, Check], *, optional: Mapping[str, Check] | None = None, others: Check | None = plain
) -> Check:
    """An object with these fields. others: what further ones must be; None allows any."""
    known = {**fields, **(optional or {})}

    def check_all(value: Any, name: str) -> None:
        _object(value, name)
        missing = [key for key in fields if key not in value]
        if missing:
            raise DamagedError(f"{_below(name, missing[0])} is missing")
        for key, below in value.items():
            check = known.get(key, others)
            if check is not None:
                check(below, _below(name, key))

    return check_all


def unknown(value: Any, name: str) -> None:
    """For `others`: there are none."""
    raise DamagedError(f"{name:.80} is a key that it does not have")


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DamagedError(f"{name or 'it'} is no object")
    return value


def _below(name: str, key: str) -> str:
    return f"{name}.{key:.40}" if name else f"{key:.40}"


def parse(data: bytes, check: Check) -> Any:
    """A JSON file that `check` finds well; raises DamagedError."""
    root = parse_json(data)
    check(root, "")
    return root
