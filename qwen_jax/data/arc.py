"""What a stream line may hold: an ARC task or a text, validated; and how source rows become such lines."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from qwen_jax.data.dialogues import (
    ALPACA,
    SHAREGPT,
    alpaca_messages,
    is_alpaca,
    is_sharegpt,
    sharegpt_messages,
)
from qwen_jax.kinds import LINE_NOTES

Grid = list[list[int]]
Notes = Mapping[str, str | int]


class BadRecord(ValueError):
    """One input record that cannot be used; str() is the reason."""


@dataclass(frozen=True)
class Task:
    """An ARC task. train: pairs {"input": grid, "output": grid}; test: the same, the output optional.

    A grid is a rectangle of colours 0-9, a list of rows. notes: see kinds.LINE_NOTES.
    """

    task_id: str
    train: list[dict[str, Grid]]
    test: list[dict[str, Grid]]
    notes: Notes = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """A prompt given as it is: either `text` or chat `messages` ({"role", "content"} each, and some of
    _MESSAGE_TEXTS and `tool_calls`) with the `tools` that they may call. notes: see kinds.LINE_NOTES."""

    task_id: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    notes: Notes = field(default_factory=dict)


_RECORD_KEYS = ("train", "test", "messages", "text", "prompt", "tools", "conversations", *LINE_NOTES)
_MESSAGE_TEXTS = ("reasoning_content", "name", "tool_call_id")
_MOST_NOTE = 1 << 16
PAIRS, TASKS, MESSAGES, TEXTS = "pairs of grids", "ARC tasks", "chat messages", "texts"
"""What a row of a source can be taken for, beside the forms of data/dialogues.py."""
DEFAULT_COLUMN = "examples"
# Empty lists and objects take 3 bytes of a line, and up to 200 of memory.
_NODES_FREE, _BYTES_A_NODE = 1_000_000, 16
_COLOURS = frozenset(range(10))
_NAME_KEYS = ("task_id", "source", "id", "uid")

Row = tuple[int, dict[str, Any] | bytes | BadRecord]
"""A row of a source dataset with its index: decoded, a line of JSON, or why it cannot even be read."""


def parse_row_line(raw: bytes) -> dict[str, Any]:
    """A line of a source file as its row; raises BadRecord."""
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadRecord("not a JSON object")
    return row


def parse_line(raw: bytes) -> Task | Text:
    """Reads one line of a stream; raises BadRecord with the reason if it is not usable."""
    if not raw.strip():
        raise BadRecord("empty line")
    if raw.count(b"[") + raw.count(b"{") > _NODES_FREE + len(raw) // _BYTES_A_NODE:
        raise BadRecord("more lists and objects than a line of its length may have")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 (byte {error.start})") from error
    return parse_record(parse_json(text))


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN or infinity; raises BadRecord, also for nesting too deep to read."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise BadRecord("not JSON: nested too deeply") from error
    except ValueError as error:
        raise BadRecord(f"not JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def parse_record(record: Any) -> Task | Text:
    """A decoded JSON object as Task or Text; raises BadRecord for anything else, and for invalid grids.

    A field that is null counts as absent: tables of mixed rows fill their gaps with it.
    """
    if not isinstance(record, Mapping):
        raise BadRecord(f"not a JSON object but {type(record).__name__}")
    keys = ", ".join(_shown(key) for key in sorted(map(str, record))[:10]) or "none"
    record = {key: value for key, value in record.items() if value is not None}
    task_id = record.get("task_id") or ""
    if not isinstance(task_id, str):
        raise BadRecord("task_id is not a string")
    check_encodable(task_id, "task_id")
    notes = _parse_notes(record)
    if "train" in record and "test" in record:
        train = _parse_pairs(record["train"], "train", output_required=True)
        return Task(task_id, train, _parse_pairs(record["test"], "test", output_required=False), notes)
    if "messages" in record:
        messages = _parse_messages(record["messages"])
        return Text(task_id, messages=messages, tools=_parse_tools(record.get("tools"), "tools"), notes=notes)
    for key in ("text", "prompt"):
        if key in record:
            return Text(task_id, text=_parse_text(record[key], key), notes=notes)
    advice = (
        "; rows of a dataset become a stream with create_dataset_streams.py" if "examples" in record else ""
    )
    raise BadRecord(
        f"neither an ARC task (train, test) nor text, prompt or messages; its keys: {keys}{advice}"
    )


def _parse_notes(record: Mapping[str, Any]) -> dict[str, str | int]:
    notes: dict[str, str | int] = {key: record[key] for key in LINE_NOTES if key in record}
    for key, value in notes.items():
        too_much = value < 0 if isinstance(value, int) else len(str(value)) > _MOST_NOTE
        if type(value) is not LINE_NOTES[key] or too_much:
            raise BadRecord(f"{key} is not what create_dataset_streams.py writes there")
        check_encodable(str(value), key)
    return notes


def _parse_tools(tools: Any, where: str) -> list[Any] | None:
    """Tools, or calls of them: JSON that a chat template shows as it likes."""
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRecord(f"{where} is not a list of objects")
    check_encodable(json.dumps(tools, ensure_ascii=False, default=str), where)
    return tools


def _shown(key: str) -> str:
    """A key as a reason may carry it: short, and free of half surrogate pairs, which no log can take."""
    return key[:40].encode(errors="backslashreplace").decode()


def _parse_pairs(pairs: Any, where: str, *, output_required: bool) -> list[dict[str, Grid]]:
    if not isinstance(pairs, list) or not pairs:
        raise BadRecord(f"{where} is not a list of pairs, or empty")
    parsed = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, Mapping) or "input" not in pair:
            raise BadRecord(f"{where}[{number}] is not an object with input and output")
        sides = ["input"]
        if output_required or pair.get("output") is not None:
            sides.append("output")
        parsed.append({side: _parse_grid(pair.get(side), f"{where}[{number}].{side}") for side in sides})
    return parsed


def _parse_grid(grid: Any, where: str) -> Grid:
    if not isinstance(grid, list) or not grid or not all(isinstance(row, list) for row in grid):
        raise BadRecord(f"{where} is not a grid (a list of rows), or empty")
    widths = {len(row) for row in grid}
    if widths == {0}:
        raise BadRecord(f"{where} is an empty grid")
    if len(widths) > 1:
        raise BadRecord(f"{where} is ragged: rows of {min(widths)} to {max(widths)} cells")
    # The whole grid at once: a 200,000-row dataset has some hundred million cells.
    cells = list(chain.from_iterable(grid))
    if set(map(type, cells)) != {int} or not _COLOURS.issuperset(cells):
        cell = next(cell for cell in cells if type(cell) is not int or cell not in _COLOURS)
        shown = cell if type(cell) is int else f"of type {type(cell).__name__}"
        raise BadRecord(f"{where} has a cell {shown}; cells are whole numbers from 0 to 9")
    return grid


def _parse_text(text: Any, key: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise BadRecord(f"{key} is not a string, or empty")
    check_encodable(text, key)
    return text


def check_encodable(text: str, key: str) -> None:
    """Raises BadRecord for half of a surrogate pair: JSON can spell it, but no UTF-8 and no tokenizer can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{key} holds half of a surrogate pair") from error


def _parse_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise BadRecord("messages is not a list, or empty")
    return [_parse_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _parse_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRecord(f"{where} is not an object with role and content")
    calls = _parse_tools(message.get("tool_calls"), f"{where}.tool_calls")
    content = "" if calls and message.get("content") is None else message.get("content")
    texts = {"role": message.get("role"), "content": content}
    texts |= {key: message[key] for key in _MESSAGE_TEXTS if message.get(key) is not None}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise BadRecord(f"{where}.{key} is not a string")
        check_encodable(text, f"{where}.{key}")
    return texts | ({"tool_calls": calls} if calls else {})


def task_from_row(row: Mapping[str, Any], column_name: str, task_id: str) -> dict[str, Any]:
    """One row of a source dataset as the object of a stream line (see record_from_row)."""
    return record_from_row(row, column_name, task_id)[1]


def record_from_row(row: Mapping[str, Any], column_name: str, task_id: str) -> tuple[str, dict[str, Any]]:
    """One row of a source dataset: what it was taken for, and the object of a stream line.

    row: holds under `column_name` pairs of grids ([input, output] or {"input", "output"}; a JSON string of them, arrays
    and tuples are fine), the last pair being the test, or, under another name than DEFAULT_COLUMN, a text or a
    dialogue; or is an ARC task, a text row or a dialogue already.
    task_id: the name where the row has none of its own.
    Raises BadRecord with the reason.
    """
    try:
        row = {key: _plain(row[key]) if key in (column_name, *_RECORD_KEYS) else row[key] for key in row}
    except RecursionError as error:
        raise BadRecord("nested too deeply") from error
    name = next((row[key] for key in _NAME_KEYS if _is_name(row.get(key))), task_id)
    check_encodable(name, "task_id")
    kind, fields = _taken_for(row, column_name)
    record = parse_record(
        fields | {key: row[key] for key in LINE_NOTES if type(row.get(key)) is LINE_NOTES[key]}
    )
    line = {"task_id": name, **record.notes}
    if isinstance(record, Task):
        return kind, line | {"train": record.train, "test": record.test}
    if record.messages is not None:
        return kind, line | {"messages": record.messages} | ({"tools": record.tools} if record.tools else {})
    return kind, line | {"text": record.text}


def _taken_for(row: dict[str, Any], column_name: str) -> tuple[str, dict[str, Any]]:
    """What a row is, and the fields of a record that say it."""
    there = {key: value for key, value in row.items() if value is not None}
    tools = {"tools": there.get("tools")}
    if "train" in there and "test" in there:
        return TASKS, {"train": there["train"], "test": there["test"]}
    if column_name in there:
        return _of_column(there[column_name], column_name, tools)
    if "messages" in there:
        return MESSAGES, {"messages": there["messages"], **tools}
    if is_sharegpt(there.get("conversations")):
        return SHAREGPT, {"messages": sharegpt_messages(there["conversations"], there.get("system")), **tools}
    if "text" not in there and "prompt" not in there and is_alpaca(there):
        return ALPACA, {"messages": alpaca_messages(there)}
    return TEXTS, {key: value for key, value in row.items() if key not in ("task_id", *LINE_NOTES)}


def _of_column(value: Any, column_name: str, tools: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if column_name != DEFAULT_COLUMN:
        if isinstance(value, str) and not value.lstrip().startswith("["):
            return TEXTS, {"text": value}
        if is_sharegpt(value):
            return SHAREGPT, {"messages": sharegpt_messages(value), **tools}
        if isinstance(value, list) and all(isinstance(each, Mapping) and "role" in each for each in value):
            return MESSAGES, {"messages": value, **tools}
    *train, test = _pairs_of_column(value, column_name)
    return PAIRS, {"train": train, "test": [test]}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _pairs_of_column(pairs: Any, column_name: str) -> list[Any]:
    if isinstance(pairs, str):
        pairs = parse_json(pairs)
    if not isinstance(pairs, list) or len(pairs) < 2:
        raise BadRecord(f"{column_name} is not a list of at least two pairs of grids")
    named = []
    for number, pair in enumerate(pairs):
        if isinstance(pair, list) and len(pair) == 2:
            pair = {"input": pair[0], "output": pair[1]}
        if not isinstance(pair, Mapping):
            raise BadRecord(f"{column_name}[{number}] is not a pair of grids")
        named.append(pair)
    return named


def _plain(value: Any) -> Any:
    """Arrays, tuples and integral floats (as Parquet and pandas give them) as plain lists and ints."""
    if type(value) is list:  # first, as nearly everything is one
        return value if set(map(type, value)) == {int} else [_plain(entry) for entry in value]
    if isinstance(value, str | bytes | bool | int | None):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else value
    return [_plain(entry) for entry in value] if isinstance(value, Iterable) else value
