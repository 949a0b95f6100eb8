"""Shards in the formats of other tools: one layer at a time, one shard in memory, resumable."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qwen_jax.errors import UsageError
from qwen_jax.reading.card import write_card
from qwen_jax.reading.runs import Run, open_runs
from qwen_jax.reading.samples import Layer, shard_samples
from qwen_jax.shards import EMBEDDING, load_shard
from qwen_jax.storage.local import atomic_write

ROW_ARRAYS = ("token_ids", "token_positions", "token_roles", "token_cells")
HOOKS = {
    "residual": "blocks.{}.hook_resid_post",
    "attn": "blocks.{}.hook_attn_out",
    "mlp": "blocks.{}.hook_mlp_out",
    "embedding": "hook_embed",
}
"""TransformerLens' names of what we store."""


@dataclass(frozen=True)
class Part:
    """The rows of one layer in one shard. arrays: `activations` [rows, hidden], `sample_idx` and those of
    ROW_ARRAYS that the shard has, each with one entry a row; first_row: rows in the shards before."""

    layer: Layer
    name: str
    first_row: int
    arrays: dict[str, np.ndarray]


class Writer(Protocol):
    """One output format."""

    def has(self, layer: Layer, name: str) -> bool:
        """Whether the part is written already, whole."""
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
    """Writes the shards at `path` (see open_runs) to the folder `output` in the format `to`, a key of FORMATS.

    layers: those to write, by default all. kind: which of several stored kinds; None is the main one.
    context_size: rows of an entry of hf_dataset. Started again after an interruption it writes what is missing; the
    result is the same. A dataset card (README.md) comes with it. Raises UsageError for a format, layer or kind that
    does not exist.
    """
    if to not in FORMATS:
        raise UsageError(f"no format {to!r}; choose from {', '.join(FORMATS)}")
    runs = open_runs(path)
    stored = _layers(runs[0])
    layers = tuple(stored if layers is None else layers)
    absent = [layer for layer in layers if layer not in stored]
    if absent:
        raise UsageError(f"layers {absent} are not stored at {path}; there are {stored}")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    counts = [_rows(run, name) for run in runs for name in run.shards]
    writer = FORMATS[to](output, sum(counts), kind or runs[0].kinds[0], context_size)
    kept = first_row = 0
    shards = [(run, name) for run in runs for name in run.shards]
    for (run, name), rows in zip(shards, counts, strict=True):
        part = _part_name(run, name)
        missing = [layer for layer in layers if not writer.has(layer, part)]
        kept += len(layers) - len(missing)
        for arrays, layer in _arrays(run, name, missing, kind):
            writer.write(Part(layer, part, first_row, arrays))
        first_row += rows
    writer.finish(layers)
    hook = hook_name(layers[0], kind or runs[0].kinds[0])
    write_card(output, runs, to, layers, kind, sum(counts), hook, context_size)
    return Exported(output, layers, sum(counts), len(layers) * len(shards), kept)


def hook_name(layer: Layer, kind: str) -> str:
    """TransformerLens' name of what is stored of a layer."""
    return HOOKS[EMBEDDING if layer == EMBEDDING else kind].format(layer)


def layer_folder(layer: Layer) -> str:
    """`layer_05`, or `embedding`."""
    return layer if isinstance(layer, str) else f"layer_{layer:02d}"


def _layers(run: Run) -> list[Layer]:
    if run.metadata is not None:
        return [
            *run.metadata["layers"],
            *([EMBEDDING] if run.metadata["fingerprint"]["include_embedding"] else []),
        ]
    with run.place.local(run.shards[0]) as path:
        return list(load_shard(path))


def _rows(run: Run, name: str) -> int:
    if run.metadata is not None:
        return next(entry["tokens"] for entry in run.metadata["shards"] if entry["filename"] == name)
    return sum(len(sample["token_ids"]) for sample in shard_samples(run, name))


def _part_name(run: Run, name: str) -> str:
    worker = f"worker_{run.metadata['worker_id']}-" if run.metadata else ""
    return worker + name.removesuffix(".pkl.gz")


def _arrays(
    run: Run, name: str, layers: Sequence[Layer], kind: str | None
) -> Iterator[tuple[dict[str, np.ndarray], Layer]]:
    if not layers:
        return
    samples = list(shard_samples(run, name, layers, kind))
    about = {
        key: np.concatenate([sample[key] for sample in samples])
        for key in ROW_ARRAYS
        if all(key in sample for sample in samples)
    }
    indices = [np.full(len(sample["token_ids"]), sample["sample_idx"], np.int32) for sample in samples]
    about["sample_idx"] = np.concatenate(indices)
    for layer in layers:
        rows = np.concatenate([sample["activations"].pop(layer) for sample in samples])
        yield {"activations": rows, **about}, layer


class SafetensorsWriter:
    """A folder a layer, a file a shard; bfloat16 stays bfloat16."""

    def __init__(self, output: Path, rows: int, kind: str, context_size: int):
        self._output = output

    def _path(self, layer: Layer, name: str) -> Path:
        return self._output / layer_folder(layer) / f"{name}.safetensors"

    def has(self, layer: Layer, name: str) -> bool:
        return self._path(layer, name).exists()

    def write(self, part: Part) -> None:
        from safetensors.numpy import save

        path = self._path(part.layer, part.name)
        path.parent.mkdir(exist_ok=True)
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
        self._done: list[list] = json.loads(self._list.read_text()) if self._list.exists() else []

    def has(self, layer: Layer, name: str) -> bool:
        return [layer, name] in self._done

    def write(self, part: Part) -> None:
        for key, array in part.arrays.items():
            self._put(layer_folder(part.layer) if key == "activations" else key, part.first_row, array)
        self._done.append([part.layer, part.name])
        with atomic_write(self._list) as file:
            file.write(json.dumps(self._done).encode())

    def _put(self, name: str, first_row: int, array: np.ndarray) -> None:
        path = self._output / f"{name}.npy"
        dtype = np.dtype(np.float32) if array.dtype.name == "bfloat16" else array.dtype
        if path.exists():
            whole = np.lib.format.open_memmap(path, mode="r+")
        else:
            shape = (self._rows, *array.shape[1:])
            whole = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        whole[first_row : first_row + len(array)] = array
        whole.flush()

    def finish(self, layers: Sequence[Layer]) -> None:
        pass


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
        path.parent.mkdir(exist_ok=True)
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
            files = sorted(path.name for path in folder.glob("*.arrow"))
            info = DatasetInfo(features=Dataset.from_file(str(folder / files[0])).features)
            info.write_to_directory(str(folder))
            state = {
                "_data_files": [{"filename": name} for name in files],
                "_fingerprint": layer_folder(layer),
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": None,
            }
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n")


FORMATS: dict[str, Any] = {
    "safetensors": SafetensorsWriter,
    "npy": NpyWriter,
    "hf_dataset": HfDatasetWriter,
}
"""Writers by the name of their format."""
