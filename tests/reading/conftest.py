"""One real run of the demo model, which tests read or copy; and ways to change a copy."""

import gzip
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.ledger.metadata import parse_metadata
from qwen_jax.shards import KIND_KEYS, Sample, load_shard, write_shard
from qwen_jax.shards.format import ANSWER_KEYS, ROW_KEYS
from qwen_jax.storage.checksum import file_crc32c
from tests.once import made_once
from tests.run_worker.starts import ROOT, Start

DEMO = ROOT / "examples" / "demo"
STREAMS = Path(__file__).parent / "streams" / "streams.json"
"""36 tasks, longer and of more sizes than the demo's: one loses an example at 1,024 tokens."""


def extract(root: Path, *flags: str, expect: int = 0, model: Path = DEMO / "model") -> Path:
    """Runs a worker on the stream of 36 tasks; returns its folder."""
    command = [sys.executable, "extract_activations.py", "--worker_id", "0", "--output_dir", str(root)]
    command += [
        "--dataset_path",
        str(STREAMS.parent / "stream_000.jsonl"),
        "--model_path",
        str(model),
    ]
    command += ["--checkpoint_dir", str(root / "worker_0"), "--max_seq_length", "1024", *flags]
    log = root / "log"
    root.mkdir(exist_ok=True)
    assert Start(command, os.environ | {"JAX_PLATFORMS": "cpu"}, log).wait() == expect, log.read_text()
    return root / "worker_0"


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Path:
    """A worker's folder; tests only read it."""
    flags = ("--layers_to_extract", "1", "3", "--shard_size_gb", "0.003", "--batch_size", "2")
    return made_once(tmp_path_factory, "clean", lambda root: extract(root, *flags)) / "worker_0"


@dataclass
class Copy:
    """A copy of the run that may be changed."""

    folder: Path

    def metadata(self, change: Callable[[dict], Any]) -> None:
        path = self.folder / "metadata.json"
        metadata = json.loads(path.read_text())
        change(metadata)
        path.write_text(json.dumps(metadata))

    def checkpoint(self, **fields: Any) -> None:
        path = self.folder / "checkpoint_worker_0.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def shard(self, number: int, change: Callable[[dict], Any]) -> None:
        """Changes what a shard holds, and its size and checksum in the metadata with it."""
        path = self.folder / f"shard_{number:04d}.pkl.gz"
        shard = load_shard(path)
        change(shard)
        with path.open("wb") as file:
            write_shard(file, list(shard), samples_of(shard))
        self.record(number)

    def pickled(self, number: int, change: Callable[[dict], Any]) -> None:
        """As `shard`, written by Python's own pickler, which keeps what differs between layers."""
        path = self.folder / f"shard_{number:04d}.pkl.gz"
        shard = load_shard(path)
        change(shard)
        path.write_bytes(gzip.compress(pickle.dumps(shard, 4)))
        self.record(number)

    def record(self, number: int, **entry: Any) -> None:
        """Makes the metadata's entry of a shard, and the sums over all, those of the file that is there."""
        size, crc32c = file_crc32c(self.folder / f"shard_{number:04d}.pkl.gz")

        def change(metadata: dict) -> None:
            metadata["shards"][number - 1].update(bytes=size, crc32c=crc32c, **entry)
            ledger = parse_metadata(json.dumps(metadata).encode()).ledger
            metadata.update(totals=ledger.totals())

        self.metadata(change)


def samples_of(shard: dict[int, list[dict]]) -> list[Sample]:
    """What write_shard takes, from what load_shard gives."""

    def sample(records: tuple[dict, ...]) -> Sample:
        first = records[0]
        extras = {key: first[key] for key in (*ROW_KEYS, *ANSWER_KEYS) if key in first}
        kinds = {kind: [record[kind] for record in records] for kind in KIND_KEYS if kind in first}
        arrays = [record["activation"] for record in records]
        about = (first["token_ids"], first["text_preview"], first["task_id"])
        return Sample(first["sample_idx"], arrays, *about, extras, kinds)

    return [sample(records) for records in zip(*shard.values(), strict=True)]


@pytest.fixture
def copy(clean, tmp_path) -> Copy:
    return Copy(Path(shutil.copytree(clean, tmp_path / "worker_0")))


def all_rows(folder: Path, layer: int) -> np.ndarray:
    """Every stored row of a layer in order, read without qwen_jax.reading."""
    shards = [load_shard(path) for path in sorted(folder.glob("shard_*"))]
    return np.concatenate([record["activation"] for shard in shards for record in shard[layer]])
