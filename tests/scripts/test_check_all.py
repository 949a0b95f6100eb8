"""check_all_workers.sh on checkpoints of every kind."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.few import few
from tests.scripts.conftest import ROOT, Fakes, write_script


def checkpoint(samples: object = 1251, shards: object = 3, **fields: object) -> str:
    return json.dumps(
        {"total_samples_processed": samples, "total_shards": shards, "status": "in_progress"} | fields
    )


@pytest.fixture
def check(tmp_path, fakes: Fakes):
    """Runs the script over {worker id: content of its checkpoint}; returns its lines."""

    def run(contents: dict[int, str], *arguments: str, **variables: str) -> list[str]:
        folder = tmp_path / "check points"
        folder.mkdir()
        for worker, text in contents.items():
            (folder / f"checkpoint_worker_{worker}.json").write_text(text)
        done = subprocess.run(
            [ROOT / "check_all_workers.sh", *arguments],
            env=fakes.environment(CHECKPOINT_DIR=str(folder), **variables),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.stderr == "" if contents else "nothing of any worker was found in" in done.stderr
        run.code = done.returncode
        return done.stdout.splitlines()

    return run


def test_the_guides_lines(check):
    lines = check({5: checkpoint(), 9: checkpoint(6250, 12, status="completed")}, "10")
    assert lines[1] == "Worker 1: Not started"
    assert lines[5] == "Worker 5: 1251 samples, 3 shards, in_progress"
    assert lines[8] == "Worker 8: Not started"
    assert lines[9] == "Worker 9: 6250 samples, 12 shards, completed"
    assert lines[10:] == ["Total: 7501 samples, 15 shards; 1 of 10 workers completed, 2 started"]


@pytest.mark.wide
def test_workers_8_and_9_are_decimal(check):
    lines = check({8: checkpoint(8), 9: checkpoint(9)}, "10")
    assert lines[8].startswith("Worker 8: 8 samples") and lines[9].startswith("Worker 9: 9 samples")


def test_no_checkpoint_folder(tmp_path, fakes):
    done = subprocess.run(
        [ROOT / "check_all_workers.sh", "1"], env=fakes.environment(), cwd=tmp_path, capture_output=True
    )
    assert done.stdout.decode().splitlines()[0] == "Worker 0: Not started"


@pytest.mark.wide
def test_zero_is_a_number(check):
    assert check({0: checkpoint(0, 0)}, "1") == [
        "Worker 0: 0 samples, 0 shards, in_progress",
        "Total: 0 samples, 0 shards; 0 of 1 workers completed, 1 started",
    ]


@pytest.mark.wide
def test_a_missing_status_is_in_progress(check):
    text = '{"total_samples_processed": 4, "total_shards": 1}'
    assert check({0: text}, "1")[0] == "Worker 0: 4 samples, 1 shards, in_progress"


NO_CHECKPOINTS = [
    *("", "\n", "null", "[]", "{}", "not json", checkpoint()[:40], checkpoint() + "}"),
    *(checkpoint(samples) for samples in (None, "5", -1, 1.5, True, [], 1e300)),
    *(checkpoint(shards=shards) for shards in (None, "3", 0.5)),
    *(checkpoint(status=status) for status in (7, "", "two words", "done\nWorker 9: 9", "\x1b[2J")),
]


def test_what_no_worker_writes_is_unreadable_and_counts_for_nothing(check):
    bad = len(NO_CHECKPOINTS)
    lines = check(dict(enumerate([*NO_CHECKPOINTS, checkpoint(2, 1)])), str(bad + 1))
    for worker, line in enumerate(lines[:bad]):
        assert line.startswith(f"Worker {worker}: checkpoint unreadable ("), NO_CHECKPOINTS[worker]
        assert line.endswith(f"checkpoint_worker_{worker}.json)"), NO_CHECKPOINTS[worker]
    assert lines[bad : bad + 2] == [
        f"Worker {bad}: 2 samples, 1 shards, in_progress",
        f"Total: 2 samples, 1 shards; 0 of {bad + 1} workers completed, 1 started",
    ]


def test_a_checkpoint_runs_no_code(check, tmp_path):
    target = tmp_path / "owned"
    check({0: checkpoint(f"samples_total[$(touch${{IFS}}'{target}')]")}, "1")
    assert not target.exists()


def test_the_number_of_workers(check):
    assert len(check({}, NUM_WORKERS="3")) == 4


@pytest.mark.wide
def test_32_workers_without_a_number(check):
    assert check({})[31:] == [
        "Worker 31: Not started",
        "Total: 0 samples, 0 shards; 0 of 32 workers completed, 0 started",
    ]


@pytest.mark.parametrize("number", few(["08", "0", "a[0]"]))
def test_a_bad_number_of_workers(fakes, number):
    done = subprocess.run(
        [ROOT / "check_all_workers.sh", number], env=fakes.environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"got '{number}'" in done.stderr


def test_the_exit_code_says_how_it_goes(check):
    check({0: checkpoint(status="completed"), 1: checkpoint(status="completed")}, "2")
    assert check.code == 0


@pytest.mark.wide
def test_the_exit_code_of_a_fleet_that_runs(check):
    check({0: checkpoint(status="completed"), 1: checkpoint()}, "2")
    assert check.code == 1


def test_the_exit_code_of_a_fleet_with_a_problem(check):
    check({0: checkpoint(status="completed"), 1: "{"}, "2")
    assert check.code == 2


def test_without_python(fakes, tmp_path):
    folder = tmp_path / "empty"
    write_script(folder / "unused", "")
    (folder / "dirname").symlink_to("/usr/bin/dirname")
    environment = fakes.environment(VENV_DIR=str(tmp_path)) | {"PATH": str(folder)}
    script = str(ROOT / "check_all_workers.sh")
    done = subprocess.run(["/bin/bash", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Python 3.11 or newer was not found" in done.stderr and "install" in done.stderr


def test_help(fakes):
    script = Path(ROOT / "check_all_workers.sh")
    done = subprocess.run([script, "--help"], env=fakes.environment(), capture_output=True, text=True)
    assert done.returncode == 0
    assert "CHECKPOINT_DIR" in done.stdout and "set -e" not in done.stdout
