"""Records say how a worker is doing, and nothing about them can hurt its run."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax.errors import ConfigError, TerminatedError, WriterConflictError
from qwen_jax.ledger.progress_record import ProgressRecord
from qwen_jax.run.record_writer import ProgressWriter
from tests.fake_gcs import FakeGcs, Fault
from tests.fleet.fleets import NOW, record
from tests.run_worker.conftest import cloud, inputs, server, tree, workspace  # noqa: F401  (fixtures)
from tests.waiting import until


def written(folder) -> ProgressRecord:
    return ProgressRecord.parse((folder / "progress_worker_3.json").read_bytes())


def wait_for(folder: Path, is_there: Callable[[ProgressRecord], bool]) -> ProgressRecord:
    """The first record in `folder` of which that holds."""
    until((folder / "progress_worker_3.json").exists)
    return until(lambda: found if is_there(found := written(folder)) else None)


def snapshot() -> ProgressRecord:
    return record(3, history=[])


@pytest.mark.parametrize(
    "error, status, message",
    [
        (None, "ended", ""),
        (TerminatedError("SIGTERM: stopped"), "terminated", "SIGTERM: stopped"),
        (ValueError("broken"), "failed", "broken"),
    ],
)
def test_the_last_record_says_how_it_ended(tmp_path, error, status, message):
    try:
        with ProgressWriter(3, snapshot, tmp_path, None, 1e6) as writer:
            writer.follow(snapshot)
            if error is not None:
                raise error
    except (TerminatedError, ValueError) as raised:
        assert raised is error
    assert (written(tmp_path).status, written(tmp_path).message) == (status, message)


def test_an_end_before_the_run_leaves_a_record_only_if_it_is_a_failure(tmp_path):
    with ProgressWriter(3, snapshot, tmp_path / "new", None, 1e6):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError), ProgressWriter(3, snapshot, tmp_path / "new", None, 1e6):
        raise ConfigError("other settings")
    assert (written(tmp_path / "new").message, written(tmp_path / "new").exit_code) == ("other settings", 78)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_conflict_leaves_the_record_to_the_other_writer(tmp_path, has_begun):
    path = tmp_path / "progress_worker_3.json"
    with pytest.raises(WriterConflictError), ProgressWriter(3, snapshot, tmp_path, None, 1e6) as writer:
        if has_begun:
            writer.follow(snapshot)
            wait_for(tmp_path, lambda seen: seen.status == "running")
        path.write_text("the other's")
        raise WriterConflictError("another writer")
    assert path.read_text() == "the other's"


def test_records_are_written_while_it_runs_to_both_places(tmp_path):
    bucket = tmp_path / "bucket"
    seen = []

    def counting() -> ProgressRecord:
        seen.append(len(seen))
        return record(3, samples_done=len(seen), history=[])

    with ProgressWriter(3, snapshot, tmp_path, bucket.as_uri(), 0.01) as writer:
        writer.follow(counting)
        while len(seen) < 5:
            writer._stop.wait(0.01)
    last = ProgressRecord.parse((bucket / "progress.json").read_bytes())
    assert last.to_bytes() == (tmp_path / "progress_worker_3.json").read_bytes()
    assert last.samples_done == len(seen)
    assert (last.history[0][1], last.history[-1][1]) == (1, len(seen))


def test_a_start_and_a_run_are_seen_at_once(tmp_path):
    with ProgressWriter(3, snapshot, tmp_path, None, 1e6) as writer:
        writer.begin()
        starts = wait_for(tmp_path, lambda seen: True)
        assert (starts.status, starts.exit_code, starts.history) == ("starting", None, [])
        writer.follow(snapshot)
        runs = wait_for(tmp_path, lambda seen: seen.status == "running")
        assert len(runs.history) == 1


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_a_start_goes_on_where_the_record_of_the_last_one_ends(tmp_path, place):
    """Its counts until it has its own; its history, with tokens that go on."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    before = record(3, status="failed", message="gone", exit_code=75)
    old = tmp_path / "progress_worker_3.json" if place == "local" else bucket / "progress.json"
    old.write_bytes(before.to_bytes())

    def nothing_yet() -> ProgressRecord:
        return ProgressRecord(3, "starting", 0, 0, 0, 0, 0, started_at=NOW, updated_at=NOW)

    def anew() -> ProgressRecord:
        return record(3, history=[], tokens=70)

    with ProgressWriter(3, nothing_yet, tmp_path, bucket.as_uri(), 1e6) as writer:
        writer.begin()
        starts = wait_for(tmp_path, lambda seen: seen.status == "starting")
        assert (starts.samples_done, starts.samples_total) == (before.samples_done, before.samples_total)
        assert (starts.shards, starts.message, starts.history) == (before.shards, "", [])
        writer.follow(anew)
        runs = wait_for(tmp_path, lambda seen: seen.status == "running")
    assert runs.earlier == starts.earlier == before.history
    assert runs.whole_history[-1][1:] == [anew().samples_done, before.history[-1][2] + 70]


@pytest.mark.parametrize("old", ["", "{", record(4).to_bytes().decode()])
def test_what_lies_there_of_old_cannot_hurt(tmp_path, old):
    (tmp_path / "progress_worker_3.json").write_text(old)
    with ProgressWriter(3, snapshot, tmp_path, None, 1e6) as writer:
        writer.follow(snapshot)
    assert (written(tmp_path).status, written(tmp_path).earlier) == ("ended", [])


@pytest.mark.wide
def test_the_end_waits_two_seconds_for_a_bucket_that_does_not_answer(tmp_path, monkeypatch):
    with FakeGcs() as silent:
        silent.faults.append(Fault("stall", times=99))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", silent.url)
        with ProgressWriter(3, snapshot, None, "gs://bucket/tpu_3", 60) as writer:
            writer.follow(snapshot)
            before = time.monotonic()
        assert time.monotonic() - before < 10


def test_what_is_tried_again_is_said_by_the_workers_own_store_alone(monkeypatch, caplog):
    with FakeGcs() as failing:
        failing.faults.append(Fault("status"))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", failing.url)
        with ProgressWriter(3, snapshot, None, "gs://bucket/tpu_3", 60) as writer:
            writer.follow(snapshot)
            until(failing.tree)
        assert failing.faults[0].seen > 1 and "next try" not in caplog.text


def test_what_goes_wrong_is_said_once_and_hurts_nothing(tmp_path, caplog):
    (tmp_path / "progress_worker_3.json").mkdir()
    seen = []

    def counting() -> ProgressRecord:
        seen.append(1)
        return snapshot()

    with ProgressWriter(3, snapshot, tmp_path, "gs://", 0.01) as writer:
        writer.follow(counting)
        while len(seen) < 4:
            writer._stop.wait(0.01)
    assert caplog.text.count("the progress record cannot be kept") == 1


def test_a_run_leaves_a_record_and_the_same_shards(cloud, workspace):  # noqa: F811
    cloud.having(PROGRESS_INTERVAL_S="60").run("--max_samples", "4")
    local = json.loads((cloud.root / "checkpoints" / "progress_worker_5.json").read_text())
    assert (local["status"], local["samples_done"], local["samples_total"]) == ("ended", 4, 4)
    assert json.loads(cloud.stored().pop("progress.json")) == local
    quiet = cloud.elsewhere("quiet")
    cloud.server.objects("bucket").clear()
    quiet.run("--max_samples", "4")
    assert tree(quiet.output) == tree(cloud.output) and "progress.json" not in quiet.stored()


@pytest.mark.wide
def test_a_start_with_other_settings_leaves_word_in_the_bucket(cloud):  # noqa: F811
    cloud.run("--max_samples", "2")
    cloud.having(PROGRESS_INTERVAL_S="60").run("--max_samples", "3", expect=78)
    left = ProgressRecord.parse(cloud.stored()["progress.json"])
    assert (left.status, left.exit_code) == ("failed", 78) and "max_samples: was 2, is 3" in left.message
