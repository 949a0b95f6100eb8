"""The protocol with one thing wrong each: the simulation must find every one of them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from qwen_jax.files import storage_errors
from qwen_jax.ledger.metadata import Ledger
from qwen_jax.ledger.names import METADATA_NAME, shard_stats_name
from qwen_jax.run import commit, resume
from qwen_jax.run.commit import Committer
from qwen_jax.run.places import Places
from qwen_jax.storage import atomic, gcs
from qwen_jax.storage.atomic import json_bytes
from qwen_jax.storage.store import PreconditionFailedError

Mutant = Callable[[], contextlib.AbstractContextManager]
MUTANTS: dict[str, Mutant] = {}
"""By what is wrong."""


def mutant(what: str) -> Callable[[Callable[[], Iterator[None]]], None]:
    def add(work: Callable[[], Iterator[None]]) -> None:
        MUTANTS[what] = contextlib.contextmanager(work)

    return add


def instead(place: Any, name: str, other: Any) -> Any:
    return mock.patch.object(place, name, other)


@mutant("equal bytes of a dead writer are taken as they are (as before)")
def _() -> Iterator[None]:
    def upload(self: Committer, name: str) -> None:
        path, store = self._places.output_dir / name, self._places.store
        try:
            store.put_file(name, path, if_generation=0)
        except PreconditionFailedError as refused:
            self._store_markers(self.ledger)
            store.put_file(name, path, if_generation=refused.present.generation if refused.present else 0)

    with instead(Committer, "_upload", upload):
        yield


@mutant("--force_restart deletes without conditions, the markers first (as before)")
def _() -> Iterator[None]:
    def empty(run: Any, places: Any, markers: dict[str, int], data: list) -> None:
        for name in [*markers, *(info.name for info in data)]:
            places.store.delete(name)

    with instead(resume, "_empty_bucket", empty):
        yield


@mutant("--force_restart fences others out, but deletes without conditions")
def _() -> Iterator[None]:
    delete = gcs.GcsStore.delete
    with instead(gcs.GcsStore, "delete", lambda self, name, _: delete(self, name)):
        yield


@mutant("--force_restart deletes first and fences others out then")
def _() -> Iterator[None]:
    empty = resume._empty_bucket

    def late(run: Any, places: Any, markers: dict[str, int], data: list) -> None:
        for info in data:
            places.store.delete(info.name, info.generation)
        empty(run, places, markers, [])

    with instead(resume, "_empty_bucket", late):
        yield


@mutant("an orphan is replaced without a look at the markers")
def _() -> Iterator[None]:
    def upload(self: Committer, name: str) -> None:
        generation = 0
        while True:
            try:
                self._places.store.put_file(
                    name, self._places.output_dir / name, generation, writer=self._fence.writer
                )
                return
            except PreconditionFailedError as refused:
                generation = refused.present.generation if refused.present else 0

    with instead(Committer, "_upload", upload):
        yield


@mutant("an orphan is looked at after the markers")
def _() -> Iterator[None]:
    def upload(self: Committer, name: str) -> None:
        store, path = self._places.store, self._places.output_dir / name
        try:
            store.put_file(name, path, 0, writer=self._fence.writer)
        except PreconditionFailedError:
            self._store_markers(self.ledger)
            present = store.stat(name)
            store.put_file(name, path, present.generation if present else 0, writer=self._fence.writer)

    with instead(Committer, "_upload", upload):
        yield


@mutant("an orphan is replaced whatever has become of it")
def _() -> Iterator[None]:
    put_file = gcs.GcsStore.put_file

    def blind(self: Any, name: str, path: Any, if_generation: int | None = None, **options: Any) -> Any:
        return put_file(self, name, path, None if if_generation else 0, **options)

    with instead(gcs.GcsStore, "put_file", blind):
        yield


@mutant("the markers are written before the shard")
def _() -> Iterator[None]:
    upload, commit = Committer.upload, Committer.commit

    def ahead(self: Committer, ledger: Ledger) -> None:
        commit(self, ledger)
        upload(self, ledger)

    with instead(Committer, "upload", lambda *_: None), instead(Committer, "commit", ahead):
        yield


@mutant("the markers of a later shard do not wait for those before")
def _() -> Iterator[None]:
    upload, commit = Committer.upload, Committer.commit

    def at_once(self: Committer, ledger: Ledger) -> None:
        upload(self, ledger)
        commit(self, ledger)

    with instead(Committer, "upload", at_once):
        yield


@mutant("the checkpoint is written before metadata.json")
def _() -> Iterator[None]:
    def swapped(self: Committer, ledger: Ledger) -> None:
        self._put_marker(self._places.checkpoint_name, json_bytes(ledger.checkpoint(self._run)))
        self._put_marker(METADATA_NAME, json_bytes(ledger.metadata(self._run)))

    with instead(Committer, "_store_markers", swapped):
        yield


@mutant("the markers are written without conditions")
def _() -> Iterator[None]:
    put_bytes = gcs.GcsStore.put_bytes
    with instead(
        gcs.GcsStore,
        "put_bytes",
        lambda self, name, data, if_generation=None, **options: put_bytes(self, name, data, None, **options),
    ):
        yield


@mutant("a refused write of equal bytes counts as one's own, whoever wrote it")
def _() -> Iterator[None]:
    accept = gcs.accept_or_conflict
    with instead(
        gcs, "accept_or_conflict", lambda wanted, *rest: accept(replace(wanted, writer=None), *rest)
    ):
        yield


@mutant("a refused write counts as one's own where the size is right")
def _() -> Iterator[None]:
    accept = gcs.accept_or_conflict

    def lax(wanted: Any, condition: Any, present: Any, where: str) -> Any:
        if present is not None and present.size == wanted.size:
            return present
        return accept(wanted, condition, present, where)

    with instead(gcs, "accept_or_conflict", lax):
        yield


@mutant("a shard that lies in the bucket counts as durable though no marker there covers it")
def _() -> Iterator[None]:
    with (
        instead(resume._Claim, "covered", property(lambda claim: 0 if claim.says_nothing else 10**6)),
        instead(resume, "_refuse_lost", lambda *_: None),
    ):
        yield


@mutant("the markers are believed without a look at the shards")
def _() -> Iterator[None]:
    with (
        instead(resume, "_local_check", lambda places: lambda entries: [True] * len(entries)),
        instead(resume, "_bucket_check", lambda places: lambda entries: [True] * len(entries)),
    ):
        yield


@mutant("a file gets its name before its bytes are synced")
def _() -> Iterator[None]:
    def finish(self: Any) -> None:
        with storage_errors("write", self.path):
            self._file.close()
            atomic.os.rename(atomic._temp_path(self.path), self.path)
            atomic.sync_folder(self.path.parent)

    with instead(atomic.AtomicFile, "_finish", finish):
        yield


@mutant("the folder is not synced")
def _() -> Iterator[None]:
    with instead(atomic, "sync_folder", lambda folder: None):
        yield


@mutant("files are written under their final names")
def _() -> Iterator[None]:
    with instead(atomic, "_temp_path", lambda path: path):
        yield


@mutant("what is deleted locally may come back when the power fails")
def _() -> Iterator[None]:
    def careless(paths: list, places: Places) -> None:
        for path in paths:
            with storage_errors("delete", path):
                path.unlink()

    with instead(resume, "_delete_local", careless):
        yield


TWO_MOMENTS = "a checkpoint and a metadata.json of two moments are believed"
DELETED = "what a start before it deleted locally may come back when the power fails"
STALE = "a shard of other bits stands beside new statistics until it is replaced"
BARE = "a kept shard is uploaded without its statistics, since others lie in the bucket"


@mutant(TWO_MOMENTS)
def _() -> Iterator[None]:
    def read(run: Any, places: Places, fence: Any) -> Any:
        contents: dict[str, Any] = {}
        for name in (places.checkpoint_name, METADATA_NAME):
            stored = places.bucket.get_bytes(name)
            contents[name] = stored[0] if stored else None
            fence.generations[name] = stored[1].generation if stored else 0
        return resume._claim(run, places.bucket.url, *contents.values())

    with instead(resume, "_bucket_claim", read):
        yield


@mutant(STALE)
def _() -> Iterator[None]:
    with instead(commit, "_delete_stale", lambda path: None):
        yield


@mutant(BARE)
def _() -> Iterator[None]:
    upload, names = Committer._upload, Places.local_stats_names

    def if_there(self: Committer, name: str) -> None:
        if (self._places.output_dir / name).exists():
            upload(self, name)

    def all_names(self: Places) -> list[str]:
        return [*names(self), *map(shard_stats_name, range(10))]

    with instead(Committer, "_upload", if_there), instead(Places, "local_stats_names", all_names):
        yield


@mutant(DELETED)
def _() -> Iterator[None]:
    def of_this_start(paths: list, places: Places) -> None:
        for path in paths:
            path.unlink()
        for folder in {path.parent for path in paths}:
            atomic.sync_folder(folder)

    with instead(resume, "_delete_local", of_this_start):
        yield


@mutant("a shard is uploaded before its statistics")
def _() -> Iterator[None]:
    commit = Committer.commit

    def without(self: Committer, ledger: Ledger) -> None:
        if self._places.store is not None:
            self._upload(ledger.shards[-1].filename)

    def late(self: Committer, ledger: Ledger) -> None:
        commit(self, ledger)
        if self._places.store is not None:
            self._upload(shard_stats_name(len(ledger.shards)))

    with instead(Committer, "upload", without), instead(Committer, "commit", late):
        yield


@mutant("local statistics are merged, whoever's shard they are of")
def _() -> Iterator[None]:
    copies = commit.StoredStats._copies

    def local_first(self: Any, name: str) -> Iterator:
        path = self._places.output_dir / name
        if path.exists():
            yield path.read_bytes(), str(path)
        yield from copies(self, name)

    with instead(commit.StoredStats, "_copies", local_first):
        yield


@mutant("a start that reads while another works takes that for damage")
def _() -> Iterator[None]:
    with instead(resume, "_refuse_a_moving_bucket", lambda *_: None):
        yield
