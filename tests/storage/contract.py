"""What every store must do, whatever is behind it; the backends' tests inherit from StoreContract."""

import dataclasses
import random
import threading

import pytest

from qwen_jax.errors import BadDataError, StorageError
from qwen_jax.storage import ObjectInfo, PreconditionFailedError
from qwen_jax.storage.checksum import crc32c_of

BIG = random.Random(0).randbytes(1_000_000)
"""Several chunks for a bucket that is opened with the smallest chunk size."""


class StoreContract:
    """Subclasses give the fixture `store`, an empty store."""

    def test_put_and_get(self, store):
        info = store.put_bytes("tpu_0/a.json", b"one")
        assert info == ObjectInfo("tpu_0/a.json", 3, crc32c_of(b"one"), info.generation)
        assert info.generation > 0
        assert store.get_bytes("tpu_0/a.json") == (b"one", info)
        assert store.stat("tpu_0/a.json") == info

    def test_what_is_too_large_to_be_held_is_not_read(self, store, monkeypatch):
        store.put_bytes("a", b"0123")
        store.put_bytes("b", b"01234")
        monkeypatch.setattr("qwen_jax.storage.store.MOST_BYTES", 4)
        assert store.get_bytes("a")[0] == b"0123"
        with pytest.raises(BadDataError, match="b has 5 bytes"):
            store.get_bytes("b")

    def test_nothing_there(self, store, tmp_path):
        assert store.get_bytes("none") is None
        assert store.stat("none") is None
        assert store.download_file("none", tmp_path / "none") is None
        assert not (tmp_path / "none").exists()
        assert list(store.list()) == []
        store.delete("none")

    def test_empty_objects(self, store, tmp_path):
        info = store.put_bytes("empty", b"")
        assert (info.size, info.crc32c) == (0, "AAAAAA==")
        assert store.get_bytes("empty") == (b"", info)

    @pytest.mark.parametrize("data", [b"small", BIG], ids=["small", "big"])
    def test_files_go_there_and_back(self, store, tmp_path, data):
        (tmp_path / "shard").write_bytes(data)
        info = store.put_file("tpu_0/shard", tmp_path / "shard", 0)
        assert (info.size, info.crc32c) == (len(data), crc32c_of(data))
        assert store.download_file("tpu_0/shard", tmp_path / "back") == info
        assert (tmp_path / "back").read_bytes() == data

    def test_a_missing_file_is_named(self, store, tmp_path):
        with pytest.raises(StorageError, match="gone"):
            store.put_file("a", tmp_path / "gone")
        assert list(store.list()) == []

    def test_each_write_is_a_new_generation(self, store):
        generations = [store.put_bytes("a", data).generation for data in (b"1", b"1", b"2", b"1")]
        store.delete("a")
        generations.append(store.put_bytes("a", b"1").generation)
        assert len(set(generations)) == 5

    def test_must_not_exist(self, store):
        first = store.put_bytes("a", b"1", 0)
        with pytest.raises(
            PreconditionFailedError, match="a: expected no object, found generation"
        ) as caught:
            store.put_bytes("a", b"2", 0)
        assert caught.value.present == first
        assert store.get_bytes("a") == (b"1", first)

    @pytest.mark.parametrize("size", [10, 1_000_000])
    def test_must_be_that_generation(self, store, size):
        first = store.put_bytes("a", b"1" * size, 0)
        second = store.put_bytes("a", b"2" * size, first.generation)
        with pytest.raises(PreconditionFailedError) as caught:
            store.put_bytes("a", b"3" * size, first.generation)
        assert caught.value.present == second
        with pytest.raises(PreconditionFailedError) as caught:
            store.put_bytes("b", b"3" * size, first.generation)
        assert caught.value.present is None
        assert store.get_bytes("a") == (b"2" * size, second)

    def test_equal_bytes_are_a_success(self, store):
        first = store.put_bytes("a", b"1", 0)
        assert store.put_bytes("a", b"1", 0) == first

    def test_equal_bytes_of_another_writer_are_not(self, store):
        first = store.put_bytes("a", b"1", 0, writer="me")
        assert first.writer == "me" and store.stat("a").writer == "me"
        assert store.put_bytes("a", b"1", 0, writer="me") == first
        for writer in ("you", ""):
            with pytest.raises(PreconditionFailedError) as caught:
                store.put_bytes("a", b"1", 0, writer=writer)
            assert caught.value.present == first
        with pytest.raises(PreconditionFailedError):
            store.put_bytes("a", b"2", 0, writer="me")

    def test_the_writer_goes_with_the_object(self, store):
        first = store.put_bytes("a", b"1", 0, writer="me")
        assert store.put_bytes("a", b"2", first.generation).writer is None
        assert store.stat("a").writer is None

    def test_one_of_many_writers_wins(self, store):
        results: list[object] = []

        def write(number: int) -> None:
            try:
                results.append(store.put_bytes("a", b"same", 0, writer=str(number)))
            except PreconditionFailedError as error:
                results.append(error.present)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 6 and len(set(results)) == 1

    def test_delete(self, store):
        first = store.put_bytes("a", b"1")
        second = store.put_bytes("a", b"2")
        with pytest.raises(PreconditionFailedError) as caught:
            store.delete("a", first.generation)
        assert caught.value.present == second
        store.delete("a", second.generation)
        assert store.stat("a") is None
        store.delete("a", second.generation)

    def test_list_is_by_name_and_prefix(self, store):
        names = ["tpu_1/b", "tpu_1/a", "tpu_10/a", "tpu_2/a", "top", "tpu_1/é", "tpu_1/a b"]
        infos = {name: store.put_bytes(name, name.encode(), writer="w") for name in names}
        assert [info.name for info in store.list()] == sorted(names)
        assert list(store.list("tpu_1/")) == [
            infos[name] for name in sorted(names) if name.startswith("tpu_1/")
        ]
        assert [info.name for info in store.list("tpu_1")] == sorted(
            n for n in names if n.startswith("tpu_1")
        )
        assert list(store.list("none")) == []

    def test_infos_are_values(self, store):
        info = store.put_bytes("a", b"1")
        with pytest.raises(dataclasses.FrozenInstanceError):
            info.size = 2
