"""A full disk and folders that cannot be written: a clear message, exit 75, whole files only, and resume."""

import contextlib
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_jax.storage.checksum import file_crc32c
from tests.run_worker.conftest import ROOT, tree


def assert_whole(folder: Path) -> None:
    """Every shard under its final name is the one that metadata.json describes, or unknown but loadable."""
    listed = {}
    if (folder / "metadata.json").exists():
        metadata = json.loads((folder / "metadata.json").read_bytes())
        listed = {entry["filename"]: (entry["bytes"], entry["crc32c"]) for entry in metadata["shards"]}
    assert {path.name: file_crc32c(path) for path in folder.glob("shard_*.pkl.gz")} == listed


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr.splitlines()[-1]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mounts a tmpfs; skips the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.wide
def test_a_file_size_limit(workspace, finished):
    """RLIMIT_FSIZE stands for a full disk where nothing can be mounted; shards here are larger."""
    limit = 200_000
    assert all(path.stat().st_size > limit for path in finished.shards()[:-1])
    done = subprocess.run(
        workspace.command(),
        cwd=ROOT,
        env=workspace.environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )
    assert_refused(done, "shard_0001.pkl.gz", "ulimit -f")
    assert not workspace.shards()
    workspace.run()
    assert tree(workspace.output) == tree(finished.output)


@pytest.mark.wide
def test_a_full_disk(workspace, finished):
    room = sum(path.stat().st_size for path in finished.shards()[:2]) + 100_000
    with small_disk(workspace.root / "activations", str(room)):
        assert_refused(workspace.run(expect=75), "shard_0003.pkl.gz", "disk is full")
        assert_whole(workspace.output)
        assert len(workspace.shards()) == 2
        remount(workspace.root / "activations", "size=64m")
        assert "(2 shards are done)" in workspace.run().stderr
        assert tree(workspace.output) == tree(finished.output)


@pytest.mark.wide
def test_a_disk_too_full_for_the_checkpoint(workspace, finished):
    with small_disk(workspace.root / "checkpoints", "4k"):
        (workspace.root / "checkpoints" / "others").write_bytes(bytes(4096))
        assert_refused(workspace.run(expect=75), "checkpoint_worker_5.json", "disk is full")
        assert_whole(workspace.output)
        remount(workspace.root / "checkpoints", "size=1m")
        workspace.run()
        assert tree(workspace.output) == tree(finished.output)
        assert workspace.checkpoint.read_bytes() == finished.checkpoint.read_bytes()


@pytest.mark.wide
def test_a_disk_that_becomes_read_only(workspace, finished):
    with small_disk(workspace.root / "activations", "64m"):
        workspace.killed_at("shard_named:2")
        remount(workspace.root / "activations", "ro")
        assert_refused(workspace.run(expect=75), "read-only")
        remount(workspace.root / "activations", "rw")
        workspace.run()
        assert tree(workspace.output) == tree(finished.output)


@pytest.mark.parametrize("flag", ["--output_dir", "--checkpoint_dir"])
def test_a_folder_below_a_file(workspace, flag):
    (workspace.root / "file").write_text("")
    done = workspace.run(flag, str(workspace.root / "file" / "below"), expect=75)
    assert_refused(done, str(workspace.root / "file" / "below"), "part of the path is a file")
    assert not workspace.shards()


def test_a_folder_in_the_checkpoints_place(workspace):
    workspace.checkpoint.mkdir(parents=True)
    assert_refused(workspace.run(expect=75), str(workspace.checkpoint), "move it away")
    assert not workspace.shards()
