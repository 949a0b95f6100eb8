"""Recomputes a few stored samples in float32, with this toolkit's model and, where torch is installed, with
Hugging Face's, and compares every layer: largest difference, relative error, cosine. Writes the result into
metadata.json under `fidelity`, with the tolerance of the dtype. Exit code 1 if a layer is beyond it.

  python -m qwen_jax certify activations/worker_0 --samples 8
"""

import logging
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.cli import FlagParser, non_negative_int, positive_int
from qwen_jax.errors import UsageError
from qwen_jax.reading.runs import METADATA_NAME, Run, open_runs
from qwen_jax.shards import EMBEDDING, load_shard
from qwen_jax.storage.local import json_bytes

BEYOND_TOLERANCE = 1


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("path", help="worker's folder, folder of these, or gs:// address")
    parser.flag("samples", "stored samples to recompute, of each worker", default=8, type=positive_int)
    parser.flag("seed", "which samples", default=0, type=non_negative_int)
    parser.flag("model_path", "the model, where it is no longer where the run had it")
    parser.flag("dataset_path", "the stream, likewise")


def run(args: Namespace) -> int:
    logging.getLogger("qwen_jax").setLevel(logging.INFO)
    passed = [_certify(each, args) for each in open_runs(args.path)]
    return 0 if all(passed) else BEYOND_TOLERANCE


def _certify(run: Run, args: Namespace) -> bool:
    from qwen_jax.run.certify import certify
    from qwen_jax.run.recorded import reference_job

    if run.metadata is None or not run.shards:
        raise UsageError(f"{run.where} has no metadata.json or no shard; give the folder of a run")
    job = reference_job(run.metadata, args.model_path, args.dataset_path, Path(run.where))
    record = certify(job, list(_chosen(run, args.samples, args.seed)))
    _show(run, record)
    if run.metadata["status"] == "completed":
        run.place.replace(METADATA_NAME, json_bytes({**run.metadata, "fidelity": record}))
    else:
        print("the run is unfinished, so metadata.json is its worker's to write: nothing was recorded")
    return record["passed"]


def _chosen(run: Run, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Stored samples drawn from all of them, each with the arrays of every kind."""
    entries = run.metadata["shards"]
    ends = np.cumsum([entry["samples"] for entry in entries])
    drawn = np.random.default_rng(seed).choice(ends[-1], min(count, int(ends[-1])), replace=False)
    for number, entry in enumerate(entries):
        first = ends[number] - entry["samples"]
        places = sorted(int(place - first) for place in drawn if first <= place < ends[number])
        if places:
            with run.place.local(entry["filename"]) as path:
                shard = load_shard(path)
            yield from (_sample(shard, run.kinds, place) for place in places)


def _sample(shard: dict, kinds: list[str], place: int) -> dict[str, Any]:
    records = {layer: shard[layer][place] for layer in shard}
    first = next(iter(records.values()))
    of_kind = {
        kind: {
            layer: records[layer][kind if number else "activation"] for layer in records if layer != EMBEDDING
        }
        for number, kind in enumerate(kinds)
    }
    if EMBEDDING in records:
        of_kind[EMBEDDING] = {EMBEDDING: records[EMBEDDING]["activation"]}
    return {"sample_idx": first["sample_idx"], "token_ids": first["token_ids"], "kinds": of_kind}


def _show(run: Run, record: dict[str, Any]) -> None:
    print(f"{run.where}: {len(record['samples'])} samples, tolerance {record['tolerance']:.2g}")
    for name, kinds in record["references"].items():
        print(f"  against {name}")
        print(f"  {'kind':<10} {'layer':>9} {'max abs':>10} {'relative':>10}   1 - min cosine")
        for kind, layers in kinds.items():
            for layer, close in layers.items():
                print(f"  {kind:<10} {layer:>9} {_numbers(**close)}")
    print("  within the tolerance" if record["passed"] else "  BEYOND THE TOLERANCE")


def _numbers(max_abs: float | None, relative: float | None, min_cosine: float | None) -> str:
    away = None if min_cosine is None else 1 - min_cosine
    columns = ((max_abs, 10), (relative, 10), (away, 16))
    return " ".join(
        f"{'not finite' if value is None else f'{value:.2e}':>{width}}" for value, width in columns
    )
