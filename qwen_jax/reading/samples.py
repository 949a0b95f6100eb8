"""Samples one after another, whatever shards they lie in."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import starmap
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from qwen_jax import shards
from qwen_jax.errors import BadDataError, UsageError
from qwen_jax.ledger.names import METADATA_NAME
from qwen_jax.prefetch import prefetch
from qwen_jax.reading.runs import Run, bucket_shard, is_bucket_url, open_runs, runs_with_layer
from qwen_jax.shards import EMBEDDING, KIND_KEYS

Layer = int | str
"""A layer's index, or `"embedding"`."""

NOT_KNOWN = -1
"""Stands in row_arrays for what is not known of a row."""
_OF_A_LAYER = {"activation", "shape", *KIND_KEYS}


def load_shard(
    path_or_file: str | Path | BinaryIO,
    *,
    layers: Collection[Layer] | None = None,
    max_bytes: int | None = None,
) -> dict[Layer, list[dict]]:
    """As qwen_jax.shards.load_shard, which see; takes a shard's gs:// address too."""
    if not isinstance(path_or_file, str | Path) or not is_bucket_url(path_or_file):
        return shards.load_shard(path_or_file, layers=layers, max_bytes=max_bytes)
    shard = bucket_shard(str(path_or_file))
    if shard is None:
        raise UsageError(f"{path_or_file} is no shard; iter_samples reads folders")
    files, name = shard
    with files.local(name, layers) as path:
        return shards.load_shard(path, layers=layers, max_bytes=max_bytes, name=str(path_or_file))


def iter_samples(
    path: str | Path, layers: Collection[Layer] | None = None, kind: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yields every sample at `path` (see open_runs) in the order of workers and stream lines.

    A sample: `sample_idx`, `task_id`, `text_preview`, `token_ids`, those of the optional arrays that are stored
    (docs/guide.md), `worker_id` (None where there is no metadata.json), and `activations`: `{layer: [n, hidden]}` in
    the stored dtype, float32 of a quantised one. layers: those to read, by default all; workers that do not store them
    are left out. kind: which of several stored
    kinds; None is the main one. One shard is held in memory at a time, and the next one is fetched meanwhile. Raises
    ShardError for what is no whole shard, UsageError for a kind, or a layer, that is not stored.
    """
    runs = open_runs(path)
    for layer in layers or ():
        runs = runs_with_layer(runs, layer)
    wanted = [(run, name, layers) for run in runs for name in run.shards]
    for shard in fetched(wanted):
        yield from samples_in(shard, layers, kind)


class Fetched(NamedTuple):
    """A shard's file on this machine, until `turn` ends."""

    run: Run
    name: str
    path: Path
    turn: ExitStack


def fetch(run: Run, name: str, layers: Collection[Layer] | None) -> Fetched:
    """layers: those that will be read; None is all."""
    turn = ExitStack()
    return Fetched(run, name, turn.enter_context(run.files.local(name, layers)), turn)


def fetched(wanted: Iterable[tuple[Run, str, Collection[Layer] | None]]) -> Iterator[Fetched]:
    """Each shard in its turn, given by its run, its name and the layers to read; meanwhile the next one is fetched."""
    for shard in prefetch(starmap(fetch, wanted), 1):
        with shard.turn:
            yield shard


def shard_samples(
    run: Run, name: str, layers: Collection[Layer] | None = None, kind: str | None = None
) -> Iterator[dict[str, Any]]:
    """The samples of one shard, as iter_samples gives them."""
    shard = fetch(run, name, layers)
    with shard.turn:
        yield from samples_in(shard, layers, kind)


def samples_in(file: Fetched, layers: Collection[Layer] | None, kind: str | None) -> Iterator[dict[str, Any]]:
    """As shard_samples, of a shard that was fetched."""
    run = file.run
    shard = shards.load_shard(file.path, layers=layers, name=f"{run.where}/{file.name}")
    wanted = kind or run.kinds[0]
    key = shards.record_keys(run.kinds).get(wanted, wanted)
    for records in zip(*shard.values(), strict=True):
        yield _sample(dict(zip(shard, records, strict=True)), run.worker_id, key)


def listed_shard(run: Run, name: str) -> dict[Layer, list[dict]]:
    """All of one shard, as far as metadata.json describes it; raises BadDataError where it holds something else."""
    with run.files.local(name) as path:
        shard = shards.load_shard(path, name=f"{run.where}/{name}")
    first, entry = next(iter(shard.values())), run.entry(name)
    keys = set(shards.record_keys(run.kinds).values()) if set(shard) != {EMBEDDING} else {"activation"}
    lacking = [
        layer for layer, records in shard.items() if layer != EMBEDDING and not keys <= records[0].keys()
    ]
    counts = {"samples": len(first), "tokens": sum(len(record["token_ids"]) for record in first)}
    if lacking or (entry is not None and any(entry[key] != count for key, count in counts.items())):
        raise BadDataError(
            f"{run.where}/{name} does not hold what {METADATA_NAME} says; `python -m qwen_jax verify` names what is "
            "wrong there"
        )
    return shard


def _sample(records: Mapping[Layer, dict], worker_id: int | None, key: str) -> dict[str, Any]:
    first = next(iter(records.values()))
    if key not in first and list(records) != [EMBEDDING]:
        stored = [each for each in KIND_KEYS if each in first] or ["one kind, called activation"]
        raise UsageError(f"kind {key} is not stored; this shard has {', '.join(stored)}")
    about = {name: value for name, value in first.items() if name not in _OF_A_LAYER}
    activations = {
        layer: record["activation" if layer == EMBEDDING else key] for layer, record in records.items()
    }
    return {"worker_id": worker_id, **about, "activations": activations}


def row_arrays(sample: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What is known of each of a sample's n rows: always the same arrays, so that samples can be joined.

    int64 `sample_idx` [n], and int32 `token_ids`, `worker_id`, `token_positions`, `token_roles` [n] and `token_cells`
    [n, 4]; NOT_KNOWN where a text has no cells, a shard no roles, or nobody says which worker it was.
    """
    n_rows = len(sample["token_ids"])

    def every_row(value: int, *shape: int, dtype: type = np.int32) -> np.ndarray:
        return np.full((n_rows, *shape), value, dtype)

    worker_id = sample["worker_id"]
    return {
        "token_ids": sample["token_ids"],
        "sample_idx": every_row(sample["sample_idx"], dtype=np.int64),
        "worker_id": every_row(NOT_KNOWN if worker_id is None else worker_id),
        "token_positions": sample.get("token_positions", np.arange(n_rows, dtype=np.int32)),
        "token_roles": sample.get("token_roles", every_row(NOT_KNOWN)),
        "token_cells": sample.get("token_cells", every_row(NOT_KNOWN, 4)),
    }
