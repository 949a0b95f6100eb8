"""Where rows come from: a dataset on the Hugging Face Hub, or local files, always one row at a time."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qwen_jax.data.arc import BadRecord, Row
from qwen_jax.data.streams import MAX_LINE_BYTES, read_lines
from qwen_jax.errors import BadDataError, ConfigError, StorageError

_TOO_LONG = BadRecord(f"line longer than {MAX_LINE_BYTES} bytes")
DEFAULT_DATASET = "barc0/200k_HEAVY_gpt4o-description-gpt4omini-code_generated_problems"


def iter_source_rows(dataset_name: str, split: str = "train", revision: str | None = None) -> Iterator[Row]:
    """Yields (row index, row) of a dataset, in order and in bounded memory.

    dataset_name: a Hugging Face dataset id (streamed); a local file of a kind in _READERS; a folder of
    such files (in order of their names) or one made by `save_to_disk` (of a DatasetDict, `split` is read).
    A line of a .jsonl file comes as its bytes, one that is too long as a BadRecord. Raises ConfigError if a
    local path or dataset does not exist, StorageError if the hub cannot be reached.
    """
    path = Path(dataset_name).expanduser()
    if path.exists():
        rows = _local_rows(path, split)
    elif dataset_name.startswith((".", "/", "~")) or _reader(path):
        raise ConfigError(f"--dataset_name {dataset_name}: no such file or folder")
    else:
        rows = _hub_rows(dataset_name, split, revision)
    return enumerate(rows)


def _local_rows(path: Path, split: str) -> Iterator[dict[str, Any] | bytes | BadRecord]:
    if (path / "dataset_dict.json").exists():
        path = path / split
        if not path.is_dir():
            raise ConfigError(f"--split {split}: {path.parent} has no such split")
    if path.is_file():
        reader = _reader(path)
        if reader is None:
            raise ConfigError(
                f"--dataset_name {path}: can read {', '.join(_READERS)} files, not '{path.suffix}'"
            )
        yield from reader(path)
    elif (path / "state.json").exists():
        from datasets import load_from_disk

        yield from load_from_disk(str(path))
    else:
        files = [(file, reader) for file in sorted(path.iterdir()) if (reader := _reader(file))]
        if not files:
            raise ConfigError(f"--dataset_name {path}: the folder holds no {', '.join(_READERS)} file")
        for file, reader in files:
            yield from reader(file)


def _jsonl_rows(path: Path) -> Iterator[bytes | BadRecord]:
    """Lines as they are: whoever converts them parses them, on all cores."""
    with path.open("rb") as file:
        yield from _lines(file)


def _lines(file: Any) -> Iterator[bytes | BadRecord]:
    for raw in read_lines(file):
        yield _TOO_LONG if raw is None else raw


def _json_rows(path: Path) -> Iterator[dict[str, Any] | BadRecord]:
    """A list of rows, one ARC task, or ARC tasks by task id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"{path} is not JSON ({error}); mend it or leave it out") from error
    if isinstance(content, dict) and "train" in content and "test" in content:
        content = {path.stem: content}
    if isinstance(content, dict):
        content = [
            {"task_id": task_id, **task} if isinstance(task, dict) else task
            for task_id, task in content.items()
        ]
    for row in content if isinstance(content, list) else [content]:
        yield row if isinstance(row, dict) else BadRecord("not a JSON object")


def _text_rows(path: Path) -> Iterator[dict[str, Any] | BadRecord]:
    """The whole file is one text."""
    with path.open("rb") as file:
        raw = file.read(MAX_LINE_BYTES + 1)
    try:
        yield (
            _TOO_LONG
            if len(raw) > MAX_LINE_BYTES
            else {"task_id": path.stem, "text": raw.decode("utf-8-sig")}
        )
    except UnicodeDecodeError as error:
        yield BadRecord(f"not UTF-8 (byte {error.start})")


def _csv_rows(path: Path) -> Iterator[dict[str, Any] | BadRecord]:
    """By the names in its first line."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            for row in csv.DictReader(file, restkey=""):
                yield BadRecord("more fields than the first line has names") if "" in row else row
        except csv.Error as error:
            raise BadDataError(f"{path} is not CSV ({error}); mend it or leave it out") from error


def _gzip_rows(path: Path) -> Iterator[bytes | BadRecord]:
    with gzip.open(path) as file:
        yield from _compressed(path, file)


def _zstd_rows(path: Path) -> Iterator[bytes | BadRecord]:
    import pyarrow

    with io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")) as file:
        yield from _compressed(path, file)


def _compressed(path: Path, file: Any) -> Iterator[bytes | BadRecord]:
    try:
        yield from _lines(file)
    except (OSError, EOFError, zlib.error) as error:
        raise BadDataError(f"{path} cannot be decompressed ({error}); fetch it again") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise BadDataError(f"{path} is not a whole Parquet file ({error}); fetch it again") from error


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any] | bytes | BadRecord]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".jsonl.gz": _gzip_rows,
    ".jsonl.zst": _zstd_rows,
    ".csv": _csv_rows,
    ".txt": _text_rows,
}
"""By how a file's name ends."""


def _reader(path: Path) -> Callable[[Path], Iterator[dict[str, Any] | bytes | BadRecord]] | None:
    return next((reader for ending, reader in _READERS.items() if path.name.endswith(ending)), None)


def _hub_rows(dataset_name: str, split: str, revision: str | None) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield from load_dataset(dataset_name, split=split, revision=revision, streaming=True)
    except (DatasetNotFoundError, HFValidationError, ValueError) as error:
        raise ConfigError(
            f"--dataset_name {dataset_name} (split {split}, revision {revision or 'main'}): {error}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise StorageError(
            f"--dataset_name {dataset_name}: the Hugging Face Hub cannot be reached ({error}); try again, or "
            "give a local file"
        ) from error
