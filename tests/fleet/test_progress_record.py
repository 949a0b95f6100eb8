"""Records say how a worker is doing, and nothing about them can hurt its run."""

import json

import pytest

from qwen_jax.errors import ConfigError, TerminatedError, UsageError, WriterConflictError
from qwen_jax.fleet.records import ProgressRecord
from qwen_jax.run.progress_record import ProgressWriter, record_interval
from tests.fleet.fleets import record
from tests.run_worker.conftest import cloud, inputs, server, tree, workspace  # noqa: F401  (fixtures)


def written(folder) -> ProgressRecord:
    return ProgressRecord.parse((folder / "progress_worker_3.json").read_bytes())


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
        with ProgressWriter(snapshot, tmp_path, None, 1e6) as writer:
            writer.follow(snapshot)
            if error is not None:
                raise error
    except (TerminatedError, ValueError) as raised:
        assert raised is error
    assert (written(tmp_path).status, written(tmp_path).message) == (status, message)


def test_an_end_before_the_run_leaves_a_record_only_if_it_is_a_failure(tmp_path):
    with ProgressWriter(snapshot, tmp_path / "new", None, 1e6):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError), ProgressWriter(snapshot, tmp_path / "new", None, 1e6):
        raise ConfigError("other settings")
    assert (written(tmp_path / "new").message, written(tmp_path / "new").exit_code) == ("other settings", 78)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_conflict_leaves_the_record_to_the_other_writer(tmp_path, has_begun):
    (tmp_path / "progress_worker_3.json").write_text("the other's")
    with pytest.raises(WriterConflictError), ProgressWriter(snapshot, tmp_path, None, 1e6) as writer:
        if has_begun:
            writer.follow(snapshot)
        raise WriterConflictError("another writer")
    assert (tmp_path / "progress_worker_3.json").read_text() == "the other's"


def test_records_are_written_while_it_runs_to_both_places(tmp_path):
    bucket = tmp_path / "bucket"
    seen = []

    def counting() -> ProgressRecord:
        seen.append(len(seen))
        return record(3, samples_done=len(seen), history=[])

    with ProgressWriter(snapshot, tmp_path, bucket.as_uri(), 0.01) as writer:
        writer.follow(counting)
        while len(seen) < 5:
            writer._stop.wait(0.01)
    last = ProgressRecord.parse((bucket / "progress.json").read_bytes())
    assert last.to_bytes() == (tmp_path / "progress_worker_3.json").read_bytes()
    assert last.samples_done == len(seen)
    assert (last.history[0][1], last.history[-1][1]) == (1, len(seen))


def test_what_goes_wrong_is_said_once_and_hurts_nothing(tmp_path, caplog):
    (tmp_path / "progress_worker_3.json").mkdir()
    seen = []

    def counting() -> ProgressRecord:
        seen.append(1)
        return snapshot()

    with ProgressWriter(snapshot, tmp_path, "gs://", 0.01) as writer:
        writer.follow(counting)
        while len(seen) < 4:
            writer._stop.wait(0.01)
    assert caplog.text.count("the progress record cannot be written") == 1


def test_a_run_leaves_a_record_and_the_same_shards(cloud, workspace):  # noqa: F811
    cloud.having(PROGRESS_INTERVAL_S="60").run("--max_samples", "4")
    local = json.loads((cloud.root / "checkpoints" / "progress_worker_5.json").read_text())
    assert (local["status"], local["samples_done"], local["samples_total"]) == ("ended", 4, 4)
    assert json.loads(cloud.stored().pop("progress.json")) == local
    quiet = cloud.elsewhere("quiet")
    cloud.server.objects("bucket").clear()
    quiet.run("--max_samples", "4")
    assert tree(quiet.output) == tree(cloud.output) and "progress.json" not in quiet.stored()


def test_a_start_with_other_settings_leaves_word_in_the_bucket(cloud):  # noqa: F811
    cloud.run("--max_samples", "2")
    cloud.having(PROGRESS_INTERVAL_S="60").run("--max_samples", "3", expect=78)
    left = ProgressRecord.parse(cloud.stored()["progress.json"])
    assert (left.status, left.exit_code) == ("failed", 78) and "max_samples: was 2, is 3" in left.message


@pytest.mark.parametrize("text", ["x", "-1", "nan", "1e99"])
def test_a_bad_interval(text):
    with pytest.raises(UsageError, match="PROGRESS_INTERVAL_S"):
        record_interval({"PROGRESS_INTERVAL_S": text})


def test_intervals():
    assert record_interval({}) == 60 and record_interval({"PROGRESS_INTERVAL_S": "0"}) == 0
