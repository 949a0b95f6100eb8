"""Two workers with one id, and places that disagree: the bucket always ends as a single run's."""

import errno
import gzip
import json
import logging
import pickle
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import StorageError, TerminatedError, WriterConflictError
from qwen_jax.ledger.metadata import RunIdentity
from qwen_jax.ledger.names import METADATA_NAME, shard_name, shard_number, shard_stats_name
from qwen_jax.run.background import UPLOADS, BackgroundCommitter
from qwen_jax.run.commit import Committer
from qwen_jax.run.pipeline import FilledShard
from qwen_jax.run.places import Places
from qwen_jax.run.resume import resume, take_up
from qwen_jax.storage.folder import FolderStore
from tests.fake_gcs import Fault
from tests.run_worker.conftest import captured_sample, commit, filled, tree
from tests.run_worker.torture import CHECKPOINT


def total_shards(worker) -> int:
    checkpoint = worker.stored().get(CHECKPOINT)
    return json.loads(checkpoint)["total_shards"] if checkpoint else -1


def kept_shards(worker) -> list[str]:
    """Those that lie on the local disk, listed, and that no marker in the bucket covers."""
    return [shard["filename"] for shard in worker.metadata()["shards"][total_shards(worker) :]]


def assert_uploaded_first(worker, before: int, kept: list[str]) -> None:
    """After so many uploads the kept shards were the next, in any order, and none before them was stored again. Each
    counts once: what a dead writer had stored and no marker covers is stored again."""
    names = list(dict.fromkeys(name for name in worker.uploads()[before:] if not name.endswith(".json")))
    wanted = {part for name in kept for part in (name, shard_stats_name(shard_number(name)))}
    assert set(names[: len(wanted)]) == wanted
    assert min(name for name in names if name.startswith("shard_")) == kept[0]


def assert_mirrored(worker, undisturbed) -> None:
    assert tree(worker.output) | {CHECKPOINT: worker.checkpoint.read_bytes()} == undisturbed


@pytest.mark.wide
def test_a_paused_worker_finds_its_successor_and_gives_way(cloud, undisturbed):
    paused = cloud.elsewhere("paused").stopped_at("checkpoint_local:2")
    assert 1 <= total_shards(cloud) < 5
    cloud.elsewhere("successor").run()
    generations = cloud.generations()
    paused.send_signal(signal.SIGCONT)
    assert paused.wait() == 76, paused.output()
    errors = paused.output()
    assert "another writer with worker id 5" in errors and "Traceback" not in errors
    assert cloud.stored() == undisturbed
    assert cloud.generations() == generations


def test_two_at_once(cloud, undisturbed):
    """Both may lose (each fenced out by the other's marker), never both win with different results."""
    rivals = [cloud.elsewhere(name).start() for name in ("left", "right")]
    codes = sorted(rival.wait() for rival in rivals)
    errors = [rival.output() for rival in rivals]
    assert codes in ([0, 76], [76, 76], [0, 0]), errors
    if codes == [0, 0]:  # one was so late that it found the work done, or took over where the other ended
        assert any("has completed its stream already" in text for text in errors), errors
    if 0 not in codes:
        cloud.run()
    assert cloud.stored() == undisturbed


@pytest.mark.wide
def test_two_on_one_machine(cloud, undisturbed):
    first = cloud.stopped_at("opened:1")
    done = cloud.run(expect=76)
    assert "another process on this machine runs worker 5" in done.stderr
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert cloud.stored() == undisturbed


@pytest.mark.wide
def test_stale_local_files_beside_a_newer_bucket(cloud, undisturbed):
    cloud.killed_at("shard_described:1")
    shutil.copytree(cloud.root, cloud.root.with_name("stale"))
    cloud.killed_at("checkpoint_local:2")
    done = total_shards(cloud)
    assert done >= 2
    cloud.lose_disk()
    shutil.copytree(cloud.root.with_name("stale"), cloud.root, dirs_exist_ok=True)
    before = len(cloud.uploads())
    assert f"({done} shards are done)" in cloud.run().stderr
    shards = [name for name in undisturbed if name.startswith("shard_")]
    assert {name for name in cloud.uploads()[before:] if name.startswith("shard_")} == set(shards[done:])
    assert cloud.stored() == undisturbed


@pytest.mark.wide
def test_shards_kept_locally_are_uploaded_first_and_no_other_again(cloud, undisturbed):
    """The second one is stuck on its way; those behind it overtake it, and no marker lists them."""
    stuck = Fault("stall", "POST", name="shard_0002.pkl.gz")
    cloud.server.faults = [stuck]
    process = cloud.start()
    process.until(lambda: "shard_0003.pkl.gz" in cloud.stored() and total_shards(cloud) == 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert stuck.seen == 1 and "shard_0002.pkl.gz" not in cloud.stored()
    kept, before = kept_shards(cloud), len(cloud.uploads())
    assert len(kept) >= 2 and kept[0] == "shard_0002.pkl.gz"
    done = cloud.run()
    assert [f"uploading {name}, kept by an earlier run" in done.stderr for name in kept] == [True] * len(kept)
    assert_uploaded_first(cloud, before, kept)
    assert cloud.stored() == undisturbed
    assert_mirrored(cloud, undisturbed)


@pytest.mark.wide
def test_a_finished_worker_changes_nothing_in_the_bucket_even_on_a_new_disk(cloud, undisturbed):
    cloud.run()
    generations = cloud.generations()
    assert "has completed its stream already" in cloud.run().stderr
    assert cloud.generations() == generations
    cloud.lose_disk()
    assert "has completed its stream already" in cloud.run().stderr
    assert cloud.generations() == generations
    assert cloud.checkpoint.read_bytes() == undisturbed[CHECKPOINT]


@pytest.mark.wide
def test_a_lost_bucket_is_filled_from_local_files_alone(cloud, undisturbed):
    cloud.run()
    cloud.server.objects("bucket").clear()
    done = cloud.run()
    assert "compiling" not in done.stderr, "samples were computed again"
    assert cloud.stored() == undisturbed


def test_resume_from_the_bucket_alone(cloud, undisturbed):
    cloud.killed_at("checkpoint_stored:3")
    done = total_shards(cloud)
    cloud.lose_disk()
    assert done >= 2 and f"({done} shards are done)" in cloud.run().stderr
    assert cloud.stored() == undisturbed


@pytest.mark.wide
@pytest.mark.parametrize("killed_at", ["metadata_local", "metadata_stored"])
def test_killed_while_completing(cloud, undisturbed, killed_at):
    """The stream's last lines are skipped, so the last marker says more than the last shard does."""
    cloud.killed_at("completing")
    assert f"shard_{total_shards(cloud):04d}.pkl.gz" == max(
        name for name in undisturbed if name.startswith("shard_")
    )
    cloud.killed_at(killed_at)
    assert json.loads(cloud.stored()[CHECKPOINT])["status"] == "in_progress"
    cloud.run()
    assert cloud.stored() == undisturbed
    assert_mirrored(cloud, undisturbed)


IDENTITY = RunIdentity(5, "stream", "model", {"seed": 1}, {"settings": {}, "activation_types": ["residual"]})


def places_of(root: Path, machine: str, bucket: str) -> Places:
    output = root / machine
    output.mkdir(exist_ok=True)
    return Places(output, output / CHECKPOINT, CHECKPOINT, FolderStore(root / bucket))


def open_committer(root: Path, machine: str, bucket: str = "bucket") -> Committer:
    """A worker in this process, on a machine of its own."""
    places = places_of(root, machine, bucket)
    resumed = resume(IDENTITY, places)
    committer = Committer(IDENTITY, places, (0,), resumed.ledger, resumed.fence)
    if resumed.is_new:
        committer.open()
    return committer


def one_sample_shard(index: int, value: float) -> FilledShard:
    activations = np.full((1, 2, 4), value, np.float32)
    return filled(captured_sample(index, activations))


def stored_value(path) -> float:
    return pickle.loads(gzip.decompress(path.read_bytes()))[0][0]["activation"][0, 0]


def test_a_rival_with_other_bits_cannot_replace_a_committed_shard(tmp_path):
    owner = open_committer(tmp_path, "owner")
    commit(owner, one_sample_shard(0, 1.0))
    rival = open_committer(tmp_path, "rival")
    commit(owner, one_sample_shard(1, 1.0))
    before = tree(tmp_path / "bucket")
    with pytest.raises(WriterConflictError):
        commit(rival, one_sample_shard(1, 2.0))
    assert tree(tmp_path / "bucket") == before


def test_a_rival_that_replaces_an_uncommitted_shard_keeps_its_owner_from_committing_it(tmp_path, monkeypatch):
    owner = open_committer(tmp_path, "owner")
    rival = open_committer(tmp_path, "rival")
    commit_markers = owner._commit_markers
    monkeypatch.setattr(
        owner,
        "_commit_markers",
        lambda ledger: (commit(rival, one_sample_shard(0, 2.0)), commit_markers(ledger)),
    )
    with pytest.raises(WriterConflictError):
        commit(owner, one_sample_shard(0, 1.0))
    assert stored_value(tmp_path / "bucket" / "shard_0001.pkl.gz") == 2.0
    assert len(open_committer(tmp_path, "third").ledger.shards) == 1


def test_after_markers_that_may_be_written_or_not_nothing_more_is_replaced(tmp_path, monkeypatch):
    """A second upload under way meets a dead predecessor's shard: without markers of its own it must not replace it."""
    dead = open_committer(tmp_path, "dead")
    dead.upload(dead.name(dead.write(one_sample_shard(0, 2.0))))
    dead.upload(dead.name(dead.write(one_sample_shard(1, 2.0))))
    owner = open_committer(tmp_path, "owner")
    first, second = (owner.name(owner.write(one_sample_shard(number, 1.0))) for number in range(2))
    put_bytes = FolderStore.put_bytes

    def without_a_reply(self, name, data, *args, **options):
        put_bytes(self, name, data, *args, **options)
        raise StorageError("no reply")

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "put_bytes", without_a_reply)
        with pytest.raises(StorageError, match="no reply"):
            owner.upload(first)
    rival = open_committer(tmp_path, "rival")
    for attempt in (lambda: owner.upload(second), lambda: owner.commit(first)):
        with pytest.raises(StorageError, match="no reply"):
            attempt()
    assert [stored_value(tmp_path / "bucket" / shard_name(n)) for n in (1, 2)] == [2.0, 2.0]
    commit(rival, one_sample_shard(0, 3.0))
    assert len(open_committer(tmp_path, "third").ledger.shards) == 1


def test_shards_that_have_overtaken_one_are_committed_with_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    owner = open_committer(tmp_path, "owner")
    marker = tmp_path / "bucket" / METADATA_NAME
    ledgers = [owner.name(owner.write(one_sample_shard(number, 1.0))) for number in range(4)]
    for number in (1, 2, 0):
        owner.upload(ledgers[number])
    owner.commit(ledgers[0])
    written = marker.read_bytes()
    assert [shard["filename"] for shard in json.loads(written)["shards"]] == [
        shard_name(n) for n in (1, 2, 3)
    ]
    owner.upload(ledgers[3])
    for ledger in ledgers[1:3]:
        owner.commit(ledger)
    assert marker.read_bytes() == written
    owner.commit(ledgers[3])
    assert len(json.loads(marker.read_bytes())["shards"]) == 4
    assert [line for line in caplog.messages if ": samples " in line] == [
        f"{shard_name(n + 1)}: samples {n} to {n}, 2 tokens, 0.0 MB" for n in range(4)
    ]


def test_uploads_at_once_that_meet_a_dead_predecessors_shards(tmp_path, monkeypatch):
    """Each of them writes the markers again, while others are committed: one after the other, and never less."""
    dead = open_committer(tmp_path, "dead")
    for number in range(UPLOADS):
        dead.upload(dead.name(dead.write(one_sample_shard(number, 2.0))))
    listed = []
    put_bytes = FolderStore.put_bytes

    def slowly(self, name, data, *args, **options):
        listed.append((name, json.loads(data)["totals"]["shards"]) if name == METADATA_NAME else (name, None))
        time.sleep(0.002)
        return put_bytes(self, name, data, *args, **options)

    owner = open_committer(tmp_path, "owner")
    monkeypatch.setattr(FolderStore, "put_bytes", slowly)
    with BackgroundCommitter(owner) as background:
        for number in range(UPLOADS):
            background.add(one_sample_shard(number, 1.0))
        background.wait()
    names, counts = zip(*listed, strict=True)
    assert names == (METADATA_NAME, CHECKPOINT) * (len(names) // 2) and len(names) > 2 * UPLOADS
    assert list(counts[::2]) == sorted(counts[::2]) and counts[-2] == UPLOADS
    assert [stored_value(tmp_path / "bucket" / shard_name(n + 1)) for n in range(UPLOADS)] == [1.0] * UPLOADS


def test_a_start_deletes_local_shards_that_the_bucket_has_where_that_is_asked_for(tmp_path):
    owner = open_committer(tmp_path, "owner")
    for number in range(2):
        commit(owner, one_sample_shard(number, 1.0))
    owner.name(owner.write(one_sample_shard(2, 1.0)))
    places = places_of(tmp_path, "owner", "bucket")
    assert places.local_shard_names() == [shard_name(n) for n in (1, 2, 3)]
    resumed, _ = take_up(IDENTITY, places, (0,), delete_local_after_upload=True)
    assert places.local_shard_names() == [] and len(resumed.ledger.shards) == 3
    assert all((tmp_path / "bucket" / shard_name(n)).exists() for n in (1, 2, 3))
    commit(resumed, one_sample_shard(3, 1.0))
    assert (tmp_path / "bucket" / shard_name(4)).exists()


def test_a_kept_shard_that_cannot_be_stored_ends_the_start_and_what_is_tried_again(tmp_path, monkeypatch):
    owner = open_committer(tmp_path, "owner")
    for number in range(2):
        owner.name(owner.write(one_sample_shard(number, 1.0)))
    stop, first_under_way = threading.Event(), threading.Event()
    put_file = FolderStore.put_file

    def failing(self, name, *args, **options):
        if name == shard_name(1):
            first_under_way.set()
            assert stop.wait(30), "it is tried again for ever"
        if name == shard_name(2):
            assert first_under_way.wait(30)
            raise StorageError(name)
        return put_file(self, name, *args, **options)

    monkeypatch.setattr(FolderStore, "put_file", failing)
    with pytest.raises(StorageError, match="shard_0002"):
        take_up(IDENTITY, places_of(tmp_path, "owner", "bucket"), (0,), stop=stop)
    assert stop.is_set() and len(open_committer(tmp_path, "another").ledger.shards) == 1


def test_a_start_that_is_stopped_stores_no_further_kept_shards(tmp_path, monkeypatch):
    owner = open_committer(tmp_path, "owner")
    for number in range(3 * UPLOADS):
        owner.name(owner.write(one_sample_shard(number, 1.0)))
    stop = threading.Event()
    put_file = FolderStore.put_file

    def last_of_all(self, *args, **options):
        stop.set()
        return put_file(self, *args, **options)

    monkeypatch.setattr(FolderStore, "put_file", last_of_all)
    with pytest.raises(TerminatedError, match="the next start resumes"):
        take_up(IDENTITY, places_of(tmp_path, "owner", "bucket"), (0,), stop=stop)
    assert 1 <= len(open_committer(tmp_path, "another").ledger.shards) <= UPLOADS + 1


def test_a_copy_of_a_shard_that_cannot_be_deleted_is_a_storage_error(tmp_path, monkeypatch):
    """Statistics are computed from a copy of the bucket's shard where there are none."""
    owner = open_committer(tmp_path, "owner")
    commit(owner, one_sample_shard(0, 1.0))
    (tmp_path / "bucket" / shard_stats_name(1)).unlink()
    unlink = Path.unlink

    def fails(path, **options):
        if path.suffix == ".tmp":
            raise OSError(errno.EIO, "broken")
        unlink(path, **options)

    elsewhere = open_committer(tmp_path, "elsewhere")
    monkeypatch.setattr(Path, "unlink", fails)
    with pytest.raises(StorageError, match="shard_0001"):
        elsewhere.complete(1, [])


def test_a_finished_run_keeps_what_it_kept_here(tmp_path):
    owner = open_committer(tmp_path, "owner")
    commit(owner, one_sample_shard(0, 1.0))
    owner.complete(1, [])
    places = places_of(tmp_path, "owner", "bucket")
    take_up(IDENTITY, places, (0,), delete_local_after_upload=True)
    assert places.local_shard_names() == [shard_name(1)]


def test_a_shard_gets_its_name_while_the_markers_of_another_are_on_their_way(tmp_path, monkeypatch):
    owner = open_committer(tmp_path, "owner")
    first = owner.name(owner.write(one_sample_shard(0, 1.0)))
    owner.upload(first)
    begun, let_go = threading.Event(), threading.Event()
    put_bytes = FolderStore.put_bytes

    def stuck(self, *args, **options):
        begun.set()
        assert let_go.wait(30)
        return put_bytes(self, *args, **options)

    monkeypatch.setattr(FolderStore, "put_bytes", stuck)
    with ThreadPoolExecutor(2) as pool:
        committed = pool.submit(owner.commit, first)
        assert begun.wait(30)
        named = pool.submit(lambda: owner.name(owner.write(one_sample_shard(1, 1.0))))
        try:
            assert len(named.result(30).shards) == 2 and not committed.done()
        finally:
            let_go.set()
    assert len(owner.ledger.shards) == 1


def test_a_shard_whose_statistics_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    owner = open_committer(tmp_path, "owner")
    written = owner.write(one_sample_shard(0, 1.0))
    (tmp_path / "owner" / shard_stats_name(1)).mkdir()
    with pytest.raises(StorageError, match="stats_0001"):
        owner.name(written)
    assert (
        not list((tmp_path / "owner").glob("*.tmp"))
        and not places_of(tmp_path, "owner", "bucket").local_shard_names()
    )


def test_a_dead_predecessors_shard_with_other_bits_is_replaced(tmp_path):
    dead = open_committer(tmp_path, "dead")
    written = dead.write(one_sample_shard(0, 1.0))
    written.file.finish()
    places_of(tmp_path, "dead", "bucket").store.put_file(
        "shard_0001.pkl.gz", written.file.path, if_generation=0
    )
    commit(open_committer(tmp_path, "heir"), one_sample_shard(0, 2.0))
    assert stored_value(tmp_path / "bucket" / "shard_0001.pkl.gz") == 2.0


def orphan(root: Path, value: float) -> None:
    """A writer that dies when its first shard is in the bucket and no marker lists it."""
    dead = open_committer(root, "dead")
    dead._commit_markers = killed
    with pytest.raises(KeyboardInterrupt):
        commit(dead, one_sample_shard(0, value))


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_paused_writer_cannot_replace_what_its_successor_has_committed(tmp_path, monkeypatch):
    """It has looked at a dead writer's shard and is about to replace it; its successor finds equal bytes there."""
    orphan(tmp_path, 1.0)
    paused = open_committer(tmp_path, "paused")
    store, put_file = paused._places.store, FolderStore.put_file

    def put(name, path, if_generation=None, **options):
        if name == "shard_0001.pkl.gz" and if_generation:
            commit(open_committer(tmp_path, "successor"), one_sample_shard(0, 1.0))
        return put_file(store, name, path, if_generation, **options)

    monkeypatch.setattr(store, "put_file", put)
    with pytest.raises(WriterConflictError):
        commit(paused, one_sample_shard(0, 2.0))
    assert stored_value(tmp_path / "bucket" / "shard_0001.pkl.gz") == 1.0
    assert len(open_committer(tmp_path, "third").ledger.shards) == 1


def test_a_restarted_worker_replaces_its_own_shard_that_no_marker_covers(tmp_path):
    """Its local metadata describes what lies in the bucket, but a rival may be about to replace just that."""
    orphan(tmp_path, 1.0)
    store = places_of(tmp_path, "dead", "bucket").store
    before = store.stat("shard_0001.pkl.gz")
    committer, _ = take_up(IDENTITY, places_of(tmp_path, "dead", "bucket"), (0,))
    after = store.stat("shard_0001.pkl.gz")
    assert len(committer.ledger.shards) == 1
    assert after.crc32c == before.crc32c and after.generation != before.generation


def test_a_shard_that_is_covered_is_not_written_again(tmp_path):
    commit(open_committer(tmp_path, "first"), one_sample_shard(0, 1.0))
    store = places_of(tmp_path, "first", "bucket").store
    before = list(store.list())
    take_up(IDENTITY, places_of(tmp_path, "first", "bucket"), (0,))
    assert list(store.list()) == before


def test_a_paused_force_restart_does_not_delete_what_a_rival_has_committed(tmp_path, monkeypatch):
    commit(open_committer(tmp_path, "first"), one_sample_shard(0, 1.0))
    places = places_of(tmp_path, "restarted", "bucket")
    delete = FolderStore.delete

    def paused(self, name, if_generation=None):
        monkeypatch.setattr(FolderStore, "delete", delete)
        take_up(IDENTITY, places_of(tmp_path, "rival", "bucket"), (0,), force_restart=True)
        commit(open_committer(tmp_path, "rival"), one_sample_shard(0, 2.0))
        delete(self, name, if_generation)

    monkeypatch.setattr(FolderStore, "delete", paused)
    with pytest.raises(WriterConflictError):
        take_up(IDENTITY, places, (0,), force_restart=True)
    assert stored_value(tmp_path / "bucket" / "shard_0001.pkl.gz") == 2.0
    assert len(open_committer(tmp_path, "third").ledger.shards) == 1


def test_a_force_restart_fences_out_the_writer_before_it_deletes(tmp_path, monkeypatch):
    owner = open_committer(tmp_path, "owner")
    commit(owner, one_sample_shard(0, 1.0))
    monkeypatch.setattr(FolderStore, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        take_up(IDENTITY, places_of(tmp_path, "restarted", "bucket"), (0,), force_restart=True)
    with pytest.raises(WriterConflictError):
        commit(owner, one_sample_shard(1, 1.0))
    assert open_committer(tmp_path, "third").ledger.shards == ()


def test_statistics_of_an_overtaken_shard_are_not_merged(tmp_path):
    """Its own statistics lie on the disk, of a shard whose place a rival's has taken."""
    orphan(tmp_path, 2.0)
    commit(open_committer(tmp_path, "rival"), one_sample_shard(0, 1.0))
    again = open_committer(tmp_path, "dead")
    again.complete(1, [])
    bucket = tmp_path / "bucket"
    assert (bucket / "stats.safetensors").read_bytes() == (bucket / "stats_0001.safetensors").read_bytes()


def test_local_shards_that_took_another_way_are_not_adopted(tmp_path):
    """A preempted machine's disk comes back, with other bits in a shard that its heir committed."""
    old = open_committer(tmp_path, "old", bucket="elsewhere")
    commit(old, one_sample_shard(0, 1.0))
    commit(old, one_sample_shard(1, 1.0))
    commit(open_committer(tmp_path, "heir"), one_sample_shard(0, 2.0))
    resumed = resume(IDENTITY, places_of(tmp_path, "old", "bucket"))
    assert len(resumed.ledger.shards) == 1
    assert resumed.kept == resumed.ledger and resumed.local_lags
