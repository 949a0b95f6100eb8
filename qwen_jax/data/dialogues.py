"""Dialogues and instructions in the forms that datasets have them, as messages."""

from collections.abc import Mapping
from typing import Any

SHAREGPT, ALPACA = "ShareGPT dialogues", "Alpaca instructions"
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}


def is_sharegpt(turns: Any) -> bool:
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(isinstance(turn, Mapping) and _fits(turn) for turn in turns)
    )


def _fits(turn: Mapping[str, Any]) -> bool:
    return turn.get("from") in _SPEAKERS and isinstance(turn.get("value"), str)


def sharegpt_messages(turns: list[Mapping[str, Any]], system: Any = None) -> list[dict[str, str]]:
    """system: what stands beside the turns, if it is a text."""
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return first + [{"role": _SPEAKERS[turn["from"]], "content": turn["value"]} for turn in turns]


def is_alpaca(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(key), str) and row[key].strip() for key in ("instruction", "output"))


def alpaca_messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is asked, with its input below it where there is one, and the answer."""
    given = row.get("input")
    asked = row["instruction"] + (f"\n\n{given}" if isinstance(given, str) and given.strip() else "")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
