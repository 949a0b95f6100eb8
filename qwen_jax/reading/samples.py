"""Samples one after another, whatever shards they lie in."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import UsageError
from qwen_jax.reading.runs import Run, open_runs
from qwen_jax.shards import EMBEDDING, KIND_KEYS, load_shard

Layer = int | str
"""A layer's index, or `"embedding"`."""


def iter_samples(path: str | Path, layers: Collection[Layer] | None = None) -> Iterator[dict[str, Any]]:
    """Yields every sample at `path` (see open_runs) in the order of workers and stream lines.

    A sample: `sample_idx`, `task_id`, `text_preview`, `token_ids`, those of the optional arrays that are stored
    (docs/guide.md), `worker_id` (None where there is no metadata.json), and `activations`: `{layer: [n, hidden]}` in
    the stored dtype. layers: those to read, by default all. One shard is held in memory at a time. Raises
    ShardError for what is no whole shard.
    """
    for run in open_runs(path):
        for name in run.shards:
            yield from shard_samples(run, name, layers)


def shard_samples(
    run: Run, name: str, layers: Collection[Layer] | None = None, kind: str | None = None
) -> Iterator[dict[str, Any]]:
    """The samples of one shard. kind: which of several stored kinds; None is the main one."""
    with run.place.local(name) as file:
        shard = load_shard(file, layers=layers)
    worker_id = run.metadata["worker_id"] if run.metadata else None
    for records in zip(*shard.values(), strict=True):
        yield _sample(dict(zip(shard, records, strict=True)), worker_id, kind)


def _sample(records: Mapping[Layer, dict], worker_id: int | None, kind: str | None) -> dict[str, Any]:
    first = next(iter(records.values()))
    if kind is not None and kind not in first and list(records) != [EMBEDDING]:
        stored = [key for key in KIND_KEYS if key in first] or ["one kind, called activation"]
        raise UsageError(f"kind {kind} is not stored; this shard has {', '.join(stored)}")
    about = {key: value for key, value in first.items() if key not in _OF_A_LAYER}
    activations = {
        layer: record["activation" if layer == EMBEDDING else kind or "activation"]
        for layer, record in records.items()
    }
    return {"worker_id": worker_id, **about, "activations": activations}


_OF_A_LAYER = {"activation", "shape", *KIND_KEYS}
