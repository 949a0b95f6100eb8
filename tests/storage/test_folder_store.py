"""The folder that stands in for a bucket."""

import os
import shutil
import subprocess
import sys
import threading

import pytest

from qwen_jax.errors import TerminatedError, UsageError
from qwen_jax.storage import PreconditionFailedError, atomic_write, open_store
from qwen_jax.storage.checksum import crc32c_of
from qwen_jax.storage.folder import HIDDEN, FolderStore
from tests.storage.contract import StoreContract


class TestFolderStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        return FolderStore(tmp_path / "bucket")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "bucket"


def test_urls(root, monkeypatch):
    root.mkdir()
    monkeypatch.chdir(root.parent)
    stores = [open_store(url) for url in (f"file://{root}", str(root), "bucket")]
    stores[0].put_bytes("a", b"1")
    assert [store.get_bytes("a")[0] for store in stores] == [b"1"] * 3
    assert {store.url for store in stores} == {root.as_uri()}
    assert open_store(f"{(root / 'a b').as_uri()}").url.endswith("/a%20b")
    for url in ("", "s3://bucket/x", "gs://", "file://host/x", "http://x"):
        with pytest.raises(UsageError, match="cannot store to"):
            open_store(url)


@pytest.mark.parametrize("name", ["fh#1/bk", "fh?1", "a%b", "a b#", "fh#1?x=%41"])
def test_a_folders_name_is_taken_as_it_is(tmp_path, name):
    """`#` and `?` end the path of a web address, but they are letters of a name."""
    named = tmp_path / name
    open_store(named.as_uri()).put_bytes("a", b"1")
    assert (named / "a").read_bytes() == b"1"
    if "%" not in name:
        assert open_store(f"file://{named}").get_bytes("a")[0] == b"1"
    assert [path.name for path in tmp_path.iterdir()] == [name.partition("/")[0]]


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket/a\nb",
        "gs://bucket/../a",
        "gs://bucket/a/./b",
        f"gs://bucket/{'x' * 1025}",
        "gs://Bucket/a",
        *("gs://bucket#1/a", "gs://b/a", "gs://bucket/\ud800", "file:///x/\x1b[31m", "a\0b"),
    ],
)
def test_what_no_store_can_hold_is_refused(url):
    with pytest.raises(UsageError, match="cannot store to"):
        open_store(url)


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../a", "a/../../b", "a//b", "a/", ".", f"{HIDDEN}/lock", "a\0b"]
)
def test_names_stay_inside(root, name):
    with pytest.raises(UsageError, match="cannot be the name of an object"):
        FolderStore(root).put_bytes(name, b"")


def test_a_second_store_sees_the_first_ones_objects(root):
    info = FolderStore(root).put_bytes("a", b"1", 0, writer="me")
    assert FolderStore(root).stat("a") == info
    with pytest.raises(PreconditionFailedError):
        FolderStore(root).put_bytes("a", b"2", 0)


def test_files_from_elsewhere_are_adopted(root):
    store = FolderStore(root)
    mine = store.put_bytes("a", b"1", writer="me")
    with atomic_write(root / "a") as file:
        file.write(b"2")
    (root / "b").write_bytes(b"3")
    adopted = store.stat("a")
    assert adopted.generation != mine.generation
    assert (adopted.crc32c, adopted.writer) == (crc32c_of(b"2"), None)
    assert store.stat("a") == adopted == next(store.list())
    with pytest.raises(PreconditionFailedError):
        store.put_bytes("b", b"4", 0)


@pytest.mark.parametrize("lost", ["all", "generation", "objects", "torn generation", "torn sidecar"])
def test_a_lost_sidecar_never_repeats_a_generation(root, lost):
    store = FolderStore(root)
    before = store.put_bytes("a", b"1", writer="me")
    hidden = root / HIDDEN
    if lost == "all":
        shutil.rmtree(hidden)
    elif lost == "generation":
        (hidden / "generation").unlink()
    elif lost == "objects":
        shutil.rmtree(hidden / "objects")
        (hidden / "objects").mkdir()
    elif lost == "torn generation":
        (hidden / "generation").write_bytes(b"")
    else:
        (hidden / "objects" / "a.json").write_bytes(b'{"generation": 1')
    store = FolderStore(root)
    assert store.get_bytes("a")[0] == b"1"
    assert store.put_bytes("a", b"2").generation != before.generation
    with pytest.raises(PreconditionFailedError):
        store.put_bytes("a", b"3", before.generation)


def test_generations_do_not_read_the_clock(root, monkeypatch):
    store = FolderStore(root)
    for number in range(3):
        info = store.put_bytes("a", b"same size"[:8] + bytes([number]))
        os.utime(root / "a", ns=(0, 0))
        assert store.stat("a").crc32c == info.crc32c


def killed(*args: object) -> None:
    raise KeyError


def test_killed_between_rename_and_record(root, monkeypatch):
    store = FolderStore(root)
    before = store.put_bytes("a", b"1")
    monkeypatch.setattr(FolderStore, "_record", killed)
    with pytest.raises(KeyError):
        store.put_bytes("a", b"2", before.generation)
    monkeypatch.undo()
    data, info = FolderStore(root).get_bytes("a")
    assert data == b"2" and info.generation != before.generation and info.crc32c == crc32c_of(b"2")


def test_a_failed_write_leaves_the_old_object(root, tmp_path, monkeypatch):
    store = FolderStore(root)
    info = store.put_bytes("a", b"1")
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyError):
        store.put_bytes("a", b"2")
    monkeypatch.undo()
    assert store.get_bytes("a") == (b"1", info) and [item.name for item in store.list()] == ["a"]


def test_processes_exclude_each_other(root):
    code = """
import sys
from qwen_jax.storage import PreconditionFailedError, open_store
store = open_store(sys.argv[1])
for _ in range(25):
    while True:
        data, info = store.get_bytes("count")
        try:
            store.put_bytes("count", str(int(data) + 1).encode(), info.generation, writer=sys.argv[2])
            break
        except PreconditionFailedError:
            pass
"""
    FolderStore(root).put_bytes("count", b"0")
    workers = [subprocess.Popen([sys.executable, "-c", code, root, str(n)]) for n in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert FolderStore(root).get_bytes("count")[0] == b"75"


def test_waiting_for_the_lock_ends_at_stop(root):
    stop = threading.Event()
    store, other = FolderStore(root, stop=stop), FolderStore(root)
    stop.set()
    store.put_bytes("a", b"1")  # nobody holds the lock: no wait, no error
    with other._locked(), pytest.raises(TerminatedError, match="waiting for the lock"):
        store.put_bytes("a", b"2")
