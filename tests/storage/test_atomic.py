"""Local files appear whole or not at all, and every failure says which file and what to do."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from qwen_jax.errors import StorageError
from qwen_jax.storage import atomic, atomic_write, file_crc32c, write_json


def test_the_file_appears_at_the_end_with_its_checksum(tmp_path):
    path = tmp_path / "a"
    with atomic_write(path) as file:
        assert file.write(b"hello ") == 6
        file.write(memoryview(bytearray(b"world")))
        assert os.listdir(tmp_path) == ["a.tmp"]
    assert path.read_bytes() == b"hello world"
    assert os.listdir(tmp_path) == ["a"]
    assert (file.size, file.crc32c) == (11, "yZRlqg==") == file_crc32c(path)


def test_an_exception_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for error in (KeyError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), atomic_write(path) as file:
            file.write(b"new")
            raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_sync_comes_before_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename
    kinds = {True: "folder", False: "file"}
    monkeypatch.setattr(
        os, "fsync", lambda fd: calls.append(kinds[os.path.isdir(f"/proc/self/fd/{fd}")]) or fsync(fd)
    )
    monkeypatch.setattr(os, "rename", lambda *names: calls.append("rename") or rename(*names))
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x" * 100_000)
        calls.append("written")
    assert calls == ["written", "file", "rename", "folder"]


def test_a_killed_writer_leaves_no_name(tmp_path):
    code = """
import os, signal, sys
from qwen_jax.storage import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"x" * 10**6)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], timeout=60)
    assert run.returncode == -signal.SIGKILL and os.listdir(tmp_path) == ["a.tmp"]
    with atomic_write(tmp_path / "a") as file:
        file.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole" and os.listdir(tmp_path) == ["a"]


@contextlib.contextmanager
def file_size_limit(size: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10_000, 10_000_000])
def test_a_file_that_may_not_grow(tmp_path, size):
    with (
        pytest.raises(StorageError, match=r"cannot write .*/a: File too large \(.*ulimit"),
        file_size_limit(4096),
        atomic_write(tmp_path / "a") as file,
    ):
        for _ in range(size // 1000):
            file.write(bytes(1000))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "disk is full: free some space"),
        (errno.EROFS, "read-only: choose another folder"),
        (errno.EACCES, "no permission"),
        (errno.EIO, "check the disk"),
    ],
)
@pytest.mark.parametrize("where", ["open", "fsync", "rename"])
def test_system_errors_name_the_file_and_the_remedy(tmp_path, monkeypatch, where, code, advice):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    if where == "open":
        monkeypatch.setattr(atomic, "open", fail, raising=False)
    else:
        monkeypatch.setattr(os, where, fail)
    expected = pytest.raises(StorageError, match=f"cannot write .*/a: .*{advice}")
    with expected as caught, atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    assert caught.value.exit_code == 75
    assert os.listdir(tmp_path) == []


def test_a_missing_folder(tmp_path):
    with pytest.raises(StorageError, match="the folder does not exist: create it"):
        write_json(tmp_path / "none" / "a.json", {})


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "a.tmp").symlink_to(tmp_path / "victim")
    with (
        pytest.raises(StorageError, match="symbolic link, which is not followed: remove it"),
        atomic_write(tmp_path / "a") as file,
    ):
        file.write(b"x")
    assert (tmp_path / "victim").read_bytes() == b"mine" and not (tmp_path / "a").exists()


def test_a_link_in_the_place_of_the_file_is_replaced(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    assert (tmp_path / "victim").read_bytes() == b"mine" and not (tmp_path / "a").is_symlink()


def test_json_is_deterministic(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": ["é", "\ud800", None]})
    assert path.read_bytes() == b'{\n  "b": 1,\n  "a": [\n    "\\u00e9",\n    "\\ud800",\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_bytes())["b"] == 1 and os.listdir(tmp_path) == ["a.json"]


def test_storage_starts_without_jax_and_without_google_cloud(tmp_path):
    code = "import sys, qwen_jax.storage as s; s.open_store(sys.argv[1]); sys.exit(bool({'jax', 'requests', \
'google.cloud.storage', 'qwen_jax.shards'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, tmp_path], timeout=60).returncode == 0
