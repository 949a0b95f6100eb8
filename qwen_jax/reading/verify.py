"""Whether what lies there is a whole run: every sample once, every byte as recorded."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import BadDataError
from qwen_jax.reading.runs import Run
from qwen_jax.roles import role_name
from qwen_jax.shards import EMBEDDING, KIND_KEYS, ShardError, load_shard
from qwen_jax.shards.statistics import STATS_NAME, parse_stats

# Norms are stored in float32, and summed in another order than here.
_NORM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Fault:
    """Something wrong. where: the file; run, shard: where a shard itself is bad, so that it can be made again."""

    where: str
    what: str
    run: Run | None = None
    shard: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify_runs(runs: Sequence[Run], streams: str | Path | None = None) -> list[Fault]:
    """Reads everything at `runs`; returns every fault found, none for a clean set.

    streams: the `streams.json` that the workers' streams were made with, to check that no worker is missing. Holds
    one shard in memory at a time.
    """
    faults = [fault for run in runs for fault in verify_run(run)]
    described = [run for run in runs if run.metadata is not None]
    faults += _unlike_workers(described)
    if streams is not None:
        faults += _against_streams(described, Path(streams))
    return faults


def verify_run(run: Run) -> list[Fault]:
    """The faults of one worker's shards and of what metadata.json says of them."""
    if run.metadata is None:
        shards = [fault for name in run.shards for fault in _ShardCheck(run, name, None).faults()]
        return [Fault(run.where, "has no metadata.json, so that missing samples cannot be seen"), *shards]
    try:
        faults = list(_files(run))
        stored: list[int] = []
        for entry in run.metadata["shards"]:
            check = _ShardCheck(run, entry["filename"], entry)
            faults += check.faults()
            stored += check.indices
        return [*faults, *_bookkeeping(run, stored), *_statistics(run)]
    except (KeyError, TypeError, AttributeError) as error:
        return [Fault(f"{run.where}/metadata.json", f"is damaged: no usable {error}")]


def _files(run: Run) -> Iterator[Fault]:
    """Shards that nobody lists, and a checkpoint that says something else."""
    names = run.place.names()
    listed = {entry["filename"] for entry in run.metadata["shards"]}
    for name in names:
        if name.startswith("shard_") and name.endswith(".pkl.gz") and name not in listed:
            yield Fault(
                f"{run.where}/{name}", "is not listed in metadata.json; a restarted worker replaces it"
            )
    checkpoint_name = f"checkpoint_worker_{run.metadata['worker_id']}.json"
    if checkpoint_name not in names:
        return
    try:
        checkpoint = json.loads(run.place.read(checkpoint_name))
        said = [checkpoint[key] for key in ("status", "last_processed_sample_idx", "total_shards")]
    except (ValueError, KeyError, TypeError) as error:
        yield Fault(f"{run.where}/{checkpoint_name}", f"is damaged ({error!r})")
        return
    known = [run.metadata["status"], run.metadata["last_processed_sample_idx"], len(listed)]
    if said != known:
        yield Fault(f"{run.where}/{checkpoint_name}", f"says {said}, metadata.json {known}")


class _ShardCheck:
    """One shard against its entry in metadata.json (None where there is none).

    indices: the samples in it; those that its entry stands for, where it cannot be read.
    """

    def __init__(self, run: Run, name: str, entry: dict[str, Any] | None):
        self._run = run
        self._name = name
        self._entry = entry
        self.indices: list[int] = []
        if entry is not None:
            skipped = {note["sample_idx"] for note in run.metadata["skipped"]}
            span = range(entry["first_sample_idx"], entry["last_sample_idx"] + 1)
            self.indices = [index for index in span if index not in skipped]

    def faults(self) -> list[Fault]:
        if self._entry is not None and self._name not in self._run.place.names():
            return [self._bad("is missing")]
        if self._entry is not None:
            size, crc32c = self._run.place.describe(self._name)
            if size != self._entry["bytes"]:
                return [self._bad(f"has {size} bytes, metadata.json says {self._entry['bytes']}")]
            if crc32c != self._entry["crc32c"]:
                return [self._bad(f"has crc32c {crc32c}, metadata.json says {self._entry['crc32c']}")]
        try:
            with self._run.place.local(self._name) as path:
                shard = load_shard(path)
        except ShardError as error:
            return [self._bad(str(error))]
        self.indices = [record["sample_idx"] for record in next(iter(shard.values()))]
        return [self._bad(what) for what in (*self._of_records(shard), *self._against_entry(shard))]

    def _bad(self, what: str) -> Fault:
        return Fault(f"{self._run.where}/{self._name}", what, self._run, self._name)

    def _of_records(self, shard: dict) -> Iterator[str]:
        for layer, records in shard.items():
            for record in records:
                where = f"sample {record['sample_idx']}, layer {layer}"
                kinds = [key for key in ("activation", *KIND_KEYS, "answer_logprobs") if key in record]
                for kind in kinds:
                    bad = int((~np.isfinite(record[kind].astype(np.float32))).sum())
                    if bad:
                        yield f"{where}: {bad} values of {kind} are infinite or not numbers"
        for record in next(iter(shard.values())):
            yield from (f"sample {record['sample_idx']}: {what}" for what in _row_faults(record))

    def _against_entry(self, shard: dict) -> Iterator[str]:
        if self._entry is None:
            return
        metadata, first = self._run.metadata, next(iter(shard.values()))
        found = {
            "samples": len(first),
            "tokens": sum(len(record["token_ids"]) for record in first),
            "first_sample_idx": first[0]["sample_idx"],
            "last_sample_idx": first[-1]["sample_idx"],
        }
        for key, value in found.items():
            if value != self._entry[key]:
                yield f"has {key} {value}, metadata.json says {self._entry[key]}"
        layers = [layer for layer in shard if layer != EMBEDDING]
        if layers != metadata["layers"]:
            yield f"has layers {layers}, metadata.json says {metadata['layers']}"
        activation = first[0]["activation"]
        kept = (str(activation.dtype), activation.shape[1])
        said = (metadata["activation_dtype"], metadata["model"]["hidden_size"])
        if kept != said:
            yield f"holds {kept[0]} of width {kept[1]}, metadata.json says {said[0]} of width {said[1]}"
        for layer in layers:
            rows = np.concatenate([record["activation"].astype(np.float32) for record in shard[layer]])
            mean = float(np.linalg.norm(rows, axis=1).mean(dtype=np.float64))
            stated = self._entry["layer_norms"].get(str(layer), {}).get("mean", np.nan)
            if not abs(mean - stated) <= _NORM_TOLERANCE * abs(mean):
                yield f"layer {layer} has mean norm {mean:.6g}, metadata.json says {stated:.6g}"


def _row_faults(record: dict[str, Any]) -> Iterator[str]:
    positions = record.get("token_positions")
    if positions is not None and (positions[0] < 0 or (np.diff(positions) <= 0).any()):
        yield "token_positions do not ascend"
    if (record["token_ids"] < 0).any():
        yield "has negative token_ids"
    for code in np.unique(record.get("token_roles", [])):
        try:
            role_name(int(code))
        except ValueError as error:
            yield f"token_roles: {error}"
    if (record.get("answer_logprobs", np.zeros(1)) > 0).any():
        yield "has log-probabilities above 0"


def _bookkeeping(run: Run, stored: list[int]) -> Iterator[Fault]:
    """Every line of the stream is stored or skipped, once."""
    metadata, where = run.metadata, f"{run.where}/metadata.json"
    limit = metadata["fingerprint"].get("max_samples")
    lines = metadata["dataset"]["lines"]
    lines = lines if limit is None else min(lines, limit)
    reached = metadata["last_processed_sample_idx"] + 1
    if metadata["status"] != "completed" or reached < lines:
        yield Fault(
            where, f"unfinished: samples {reached} to {lines - 1} are still to come; start the worker again"
        )
    counted = Counter([*stored, *(note["sample_idx"] for note in metadata["skipped"])])
    twice = sorted(index for index, count in counted.items() if count > 1)
    missing = sorted(set(range(reached)) - counted.keys())
    beyond = sorted(index for index in counted if index >= reached)
    for indices, what in (
        (twice, "stored or skipped twice"),
        (missing, "missing"),
        (beyond, "beyond the end"),
    ):
        if indices:
            yield Fault(where, f"{what}: samples {shorten(indices)}")


def shorten(indices: Iterable[int], most: int = 10) -> str:
    """`3, 5, 8 and 20 more`."""
    listed = list(indices)
    shown = ", ".join(map(str, listed[:most]))
    return shown if len(listed) <= most else f"{shown} and {len(listed) - most} more"


def _statistics(run: Run) -> Iterator[Fault]:
    if run.metadata["status"] != "completed" or not run.metadata["shards"]:
        return
    where = f"{run.where}/{STATS_NAME}"
    data = run.place.read(STATS_NAME)
    if data is None:
        yield Fault(where, "is missing; `python -m qwen_jax stats` makes it again")
        return
    try:
        stats = parse_stats(data, where)
    except BadDataError as error:
        yield Fault(where, str(error))
        return
    tokens = sum(entry["tokens"] for entry in run.metadata["shards"])
    for kind, entry in stats.items():
        if entry.count != tokens:
            yield Fault(where, f"counts {entry.count} rows of {kind}, metadata.json {tokens}")


def _unlike_workers(runs: Sequence[Run]) -> Iterator[Fault]:
    """What must be the same in all workers of one dataset."""
    seen: dict[int, str] = {}
    for run in runs:
        worker = run.metadata["worker_id"]
        if worker in seen:
            yield Fault(run.where, f"is worker {worker}, as {seen[worker]} is")
        seen.setdefault(worker, run.where)
    for run in runs[1:]:
        ours, first = run.metadata["fingerprint"], runs[0].metadata["fingerprint"]
        for field in first.keys() | ours.keys():
            if field not in ("stream_sha256", "max_samples") and first.get(field) != ours.get(field):
                yield Fault(
                    run.where, f"has {field} {ours.get(field)!r}, {runs[0].where} has {first.get(field)!r}"
                )


def _against_streams(runs: Sequence[Run], path: Path) -> Iterator[Fault]:
    try:
        streams = json.loads(path.read_bytes())["streams"]
        expected = {entry["sha256"]: (entry["file"], entry["samples"]) for entry in streams}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadDataError(
            f"{path} is not a streams.json ({error!r}); give the one beside the streams"
        ) from error
    found = {run.metadata["fingerprint"]["stream_sha256"]: run for run in runs}
    for sha256, (file, samples) in expected.items():
        run = found.pop(sha256, None)
        if run is None:
            yield Fault(str(path), f"no worker has extracted {file}")
        elif run.metadata["last_processed_sample_idx"] + 1 != samples:
            done = run.metadata["last_processed_sample_idx"] + 1
            yield Fault(run.where, f"dealt with {done} of the {samples} samples of {file}")
    for run in found.values():
        yield Fault(run.where, f"its stream is none of {path}")
