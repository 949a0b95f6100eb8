"""Shards in the formats of other tools: one layer at a time, one shard in memory, resumable."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen_jax.bar import with_bar
from qwen_jax.errors import BadDataError, StorageError, UsageError
from qwen_jax.files import storage_errors
from qwen_jax.kinds import ALL_KINDS
from qwen_jax.ledger.checks import DamagedError, parse, read_bounded
from qwen_jax.ledger.names import METADATA_NAME, SHARD_SUFFIX
from qwen_jax.ledger.schema import EXPORTED_PARTS
from qwen_jax.reading.card import write_card
from qwen_jax.reading.manifest import Manifest
from qwen_jax.reading.runs import (
    DescribedRun,
    Run,
    local_output,
    open_runs,
    refuse_mixed,
    runs_with_layer,
    stored_layers,
)
from qwen_jax.reading.samples import Layer, fetched, row_arrays, samples_in, shard_samples
from qwen_jax.shards import EMBEDDING
from qwen_jax.storage.atomic import atomic_write, json_bytes

_UNKNOWN_HOOK = "blocks.{}.activation"
"""What stands for what no metadata.json names."""


@dataclass(frozen=True)
class Part:
    """The rows of one layer in one shard. arrays: `activations` [rows, hidden] and those of samples.row_arrays, each
    with one entry a row; first_row: rows in the shards before."""

    layer: Layer
    name: str
    first_row: int
    arrays: dict[str, np.ndarray]


class Writer(Protocol):
    """One output format."""

    def has(self, layer: Layer, name: str) -> bool:
        """Whether the part is written already, whole."""
        ...

    def rows(self, count: int) -> int:
        """How many rows of a part of `count` rows are written."""
        ...

    def write(self, part: Part) -> None:
        """Writes a part; after an interruption it is there whole or not at all."""
        ...

    def finish(self, layers: Sequence[Layer]) -> None:
        """All parts are there."""
        ...


@dataclass(frozen=True)
class Exported:
    """What was written: rows of each layer, and the parts that were there from an earlier start."""

    output: Path
    layers: tuple[Layer, ...]
    rows: int
    parts: int
    parts_kept: int


def export(
    path: str | Path,
    to: str,
    output: str | Path,
    *,
    layers: Sequence[Layer] | None = None,
    kind: str | None = None,
    context_size: int = 256,
) -> Exported:
    """Writes the shards at `path` (see open_runs) to the local folder `output` in the format `to`, a key of FORMATS.

    layers: those to write, by default all. kind: which of several stored kinds; None is the main one.
    context_size: rows of an entry of hf_dataset. Started again after an interruption it writes what is missing; the
    result is the same. A dataset card (README.md) and a list of what is there (export.json) come with it.

    Raises UsageError for a format, layer or kind that does not exist, layers of different workers, and a folder
    that holds an export of something else; BadDataError where there is no row to write.
    """
    if to not in FORMATS:
        raise UsageError(f"no format {to!r}; choose from {', '.join(FORMATS)}")
    output = local_output(output, "--output")
    runs, layers = _choose(path, layers, kind)
    shards = [(run, name) for run in runs for name in run.shards]
    counts = [_rows(run, name) for run, name in shards]
    kind = kind or runs[0].kinds[0]
    writer = FORMATS[to](output, sum(counts), kind, context_size)
    rows = sum(map(writer.rows, counts))
    if not rows:
        raise BadDataError(f"{path} holds no rows that {to} could hold{_HINTS.get(to, '')}")
    manifest = Manifest.open(output, _about(to, kind, context_size), _crc32cs(shards), fixed=to == "npy")
    kept = _write_parts(writer, shards, counts, layers, kind)
    writer.finish(layers)
    manifest.add_layers(layers)
    write_card(
        output,
        to,
        runs,
        manifest.layers,
        rows=rows,
        meanings=[_meaning(runs[0], layer, kind) for layer in manifest.layers],
        snippet={
            "folder": layer_folder(layers[0]),
            "part": part_name(*shards[0]),
            "hook": hook_name(layers[0], kind),
            "context_size": context_size,
        },
    )
    return Exported(output, layers, rows, len(layers) * len(shards), kept)


_HINTS = {"hf_dataset": "; an entry takes --context_size rows of one shard: give a smaller one"}


def _about(to: str, kind: str, context_size: int) -> dict[str, Any]:
    about = {"format": to, "kind": kind}
    return about | {"context_size": context_size} if to == "hf_dataset" else about


def _choose(
    path: str | Path, layers: Sequence[Layer] | None, kind: str | None
) -> tuple[list[Run], tuple[Layer, ...]]:
    """The runs to export and their layers."""
    runs = [run for run in open_runs(path) if run.shards]
    if not runs:
        raise BadDataError(f"{path} holds no shards yet; nothing to export")
    if layers is None:
        layers = tuple(dict.fromkeys(layer for run in runs for layer in stored_layers(run)))
    having = [runs_with_layer(runs, layer) for layer in layers]
    for layer, each in zip(layers, having, strict=True):
        refuse_mixed(each, layer, kind)
    if any(each != having[0] for each in having):
        raise UsageError(
            f"layers {', '.join(map(str, layers))} are stored by different workers; export those of each worker to a "
            "folder of its own (--layers)"
        )
    return having[0], tuple(layers)


def _rows(run: Run, name: str) -> int:
    entry = run.entry(name)
    if entry:
        return entry["tokens"]
    one_layer = stored_layers(run)[:1]
    return sum(len(sample["token_ids"]) for sample in shard_samples(run, name, one_layer))


def _crc32cs(shards: Sequence[tuple[Run, str]]) -> dict[str, str]:
    """What the parts are made of, by name."""
    found = {}
    for run, name in shards:
        entry = run.entry(name)
        found[part_name(run, name)] = entry["crc32c"] if entry else run.files.describe(name)[1]
    return found


def _write_parts(
    writer: Writer,
    shards: Sequence[tuple[Run, str]],
    counts: Sequence[int],
    layers: Sequence[Layer],
    kind: str,
) -> int:
    """Writes what is missing; returns how many parts were there."""
    rows = dict(zip(shards, counts, strict=True))
    first_rows = dict(zip(shards, accumulate(counts, initial=0), strict=False))
    missing = {
        (run, name): [layer for layer in layers if not writer.has(layer, part_name(run, name))]
        for run, name in shards
    }
    wanted = [(*shard, left) for shard, left in missing.items() if left]
    for file in with_bar(fetched(wanted), len(wanted)):
        shard = file.run, file.name
        for arrays, layer in _arrays(samples_in(file, missing[shard], kind), missing[shard]):
            _check_rows(*shard, rows[shard], len(arrays["activations"]))
            writer.write(Part(layer, part_name(*shard), first_rows[shard], arrays))
    return len(layers) * len(shards) - sum(map(len, missing.values()))


def _check_rows(run: Run, name: str, said: int, found: int) -> None:
    if said != found:
        raise BadDataError(
            f"{run.where}/{name} has {found} rows, {METADATA_NAME} says {said}; `python -m qwen_jax verify` names all "
            "that is wrong there"
        )


def hook_name(layer: Layer, kind: str) -> str:
    """TransformerLens' name of what is stored of a layer."""
    known = ALL_KINDS.get(EMBEDDING if layer == EMBEDDING else kind)
    return (known.hook if known else _UNKNOWN_HOOK).format(layer)


def _meaning(run: Run, layer: Layer, kind: str) -> str:
    """What a row of a layer is, in words."""
    if not isinstance(run, DescribedRun):
        return f"`{layer_folder(layer)}`: no metadata.json says what its rows are"
    meaning = run.metadata["layer_meanings"].get(EMBEDDING if layer == EMBEDDING else kind, "not recorded")
    return f"`{layer_folder(layer)}`: {meaning}; `{hook_name(layer, kind)}` in TransformerLens"


def layer_folder(layer: Layer) -> str:
    """`layer_05`, or `embedding`."""
    return layer if isinstance(layer, str) else f"layer_{layer:02d}"


def part_name(run: Run, name: str) -> str:
    """`worker_5-shard_0001`."""
    worker = "" if run.worker_id is None else f"worker_{run.worker_id}-"
    return worker + name.removesuffix(SHARD_SUFFIX)


def _arrays(
    samples: Iterable[dict[str, Any]], layers: Sequence[Layer]
) -> Iterator[tuple[dict[str, np.ndarray], Layer]]:
    """Of all samples of a shard what a Part of each layer holds."""
    samples = list(samples)
    rows = [row_arrays(sample) for sample in samples]
    about = {key: np.concatenate([each[key] for each in rows]) for key in rows[0]}
    for layer in layers:
        activations = np.concatenate([sample["activations"].pop(layer) for sample in samples])
        yield {"activations": activations, **about}, layer


class SafetensorsWriter:
    """A folder a layer, a file a shard; bfloat16 stays bfloat16."""

    def __init__(self, output: Path, rows: int, kind: str, context_size: int):
        self._output = output

    def _path(self, layer: Layer, name: str) -> Path:
        return self._output / layer_folder(layer) / f"{name}.safetensors"

    def has(self, layer: Layer, name: str) -> bool:
        return self._path(layer, name).exists()

    def rows(self, count: int) -> int:
        return count

    def write(self, part: Part) -> None:
        from safetensors.numpy import save

        path = self._path(part.layer, part.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(save({key: np.ascontiguousarray(array) for key, array in part.arrays.items()}))

    def finish(self, layers: Sequence[Layer]) -> None:
        pass


class NpyWriter:
    """One memory-mappable array a layer, and one for each thing known of a row. NumPy's format has no bfloat16:
    it becomes float32, which is exact."""

    def __init__(self, output: Path, rows: int, kind: str, context_size: int):
        self._output = output
        self._rows = rows
        self._list = output / "parts.json"
        self._done = self._listed() if self._list.exists() else {}
        self._unlisted = 0

    def _listed(self) -> dict[tuple[Layer, str], None]:
        """As the keys of a dict, which are found at once and stay in order."""
        try:
            return dict.fromkeys(map(tuple, parse(read_bounded(self._list), EXPORTED_PARTS)))
        except DamagedError as error:
            raise BadDataError(
                f"{self._list} is damaged ({error}); delete its folder, or choose another"
            ) from error

    def has(self, layer: Layer, name: str) -> bool:
        return (layer, name) in self._done

    def rows(self, count: int) -> int:
        return count

    def write(self, part: Part) -> None:
        for key, array in part.arrays.items():
            self._put(layer_folder(part.layer) if key == "activations" else key, part.first_row, array)
        self._done[part.layer, part.name] = None
        self._unlisted += 1
        # Each time one in a hundred is new: to write a long list for each part takes longer than the parts. What is
        # not listed is written again.
        if self._unlisted > len(self._done) // 100:
            self._write_list()

    def _write_list(self) -> None:
        with atomic_write(self._list) as file:
            file.write(json_bytes(list(self._done)))
        self._unlisted = 0

    def _put(self, name: str, first_row: int, array: np.ndarray) -> None:
        path = self._output / f"{name}.npy"
        dtype = np.dtype(np.float32) if array.dtype.name == "bfloat16" else array.dtype
        with storage_errors("write", path):
            if path.exists():
                whole = np.lib.format.open_memmap(path, mode="r+")
            else:
                shape = (self._rows, *array.shape[1:])
                self._check_space(path, dtype.itemsize * math.prod(shape))
                whole = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
                self._take_space(path)
            whole[first_row : first_row + len(array)] = array
            whole.flush()

    def _take_space(self, path: Path) -> None:
        """At once: a page of a mapped file that the disk has no room for ends the process by a signal."""
        if hasattr(os, "posix_fallocate"):  # absent on macOS
            try:
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                if error.errno not in (
                    errno.EOPNOTSUPP,
                    errno.EINVAL,
                ):  # else the file system knows no such thing
                    path.unlink()
                    raise

    def _check_space(self, path: Path, needed: int) -> None:
        free = shutil.disk_usage(self._output).free
        if needed > free:
            raise StorageError(
                f"cannot write {path}: it takes {needed:,} bytes, and the disk has {free:,} left"
            )

    def finish(self, layers: Sequence[Layer]) -> None:
        self._write_list()


class HfDatasetWriter:
    """A Hugging Face dataset a layer, as SAELens reads its cached activations.

    An entry is `context_size` rows, float32, in the column of the hook's name, and their `token_ids`. Rows of
    consecutive samples follow each other; those left over at the end of a shard are left out.
    """

    def __init__(self, output: Path, rows: int, kind: str, context_size: int):
        self._output = output
        self._kind = kind
        self._context_size = context_size

    def _path(self, layer: Layer, name: str) -> Path:
        return self._output / layer_folder(layer) / f"{name}.arrow"

    def has(self, layer: Layer, name: str) -> bool:
        return self._path(layer, name).exists()

    def rows(self, count: int) -> int:
        return count - count % self._context_size

    def _features(self, layer: Layer, hidden: int) -> Any:
        from datasets import Array2D, Features, Sequence, Value

        size = self._context_size
        return Features(
            {
                hook_name(layer, self._kind): Array2D(shape=(size, hidden), dtype="float32"),
                "token_ids": Sequence(Value("int32"), length=size),
            }
        )

    def write(self, part: Part) -> None:
        from datasets.arrow_writer import ArrowWriter

        rows, size = part.arrays["activations"], self._context_size
        path = self._path(part.layer, part.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        features = self._features(part.layer, rows.shape[1])
        unfinished = path.with_suffix(".unfinished")
        with ArrowWriter(path=str(unfinished), features=features) as writer:
            for start in range(0, len(rows) - size + 1, size):
                entry = slice(start, start + size)
                writer.write(
                    {
                        hook_name(part.layer, self._kind): rows[entry].astype(np.float32),
                        "token_ids": part.arrays["token_ids"][entry],
                    }
                )
            writer.finalize()
        unfinished.replace(path)

    def finish(self, layers: Sequence[Layer]) -> None:
        """Writes what datasets.load_from_disk looks for."""
        from datasets import Dataset, DatasetInfo

        for layer in layers:
            folder = self._output / layer_folder(layer)
            files = sorted((path.name for path in folder.glob("*.arrow")), key=_numbers)
            info = DatasetInfo(features=Dataset.from_file(str(folder / files[0])).features)
            info.write_to_directory(str(folder))
            state: dict[str, Any] = {
                "_data_files": [{"filename": name} for name in files],
                "_fingerprint": layer_folder(layer),
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            }
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def _numbers(name: str) -> list[int]:
    """Those in the name of a part: as texts, worker_10 comes before worker_9."""
    return list(map(int, re.findall(r"\d+", name)))


FORMATS: dict[str, Any] = {
    "safetensors": SafetensorsWriter,
    "npy": NpyWriter,
    "hf_dataset": HfDatasetWriter,
}
"""Writers by the name of their format."""
