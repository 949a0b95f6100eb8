"""The local engine: who gets what, who is started again, and a whole fleet with kills."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qwen_jax.errors import StorageError, UsageError
from qwen_jax.fleet.local import Ended, LocalFleet, Share, shares, spawner
from qwen_jax.fleet.supervise import LONGEST_WAIT_S, Clock, Policy
from qwen_jax.ledger.progress_record import ProgressRecord
from tests.fake_gcs import FakeGcs
from tests.run_worker.conftest import CloudWorkspace, inputs
from tests.run_worker.starts import Start
from tests.scripts.conftest import ROOT, write_script

__all__ = ["inputs"]
TASKS = 4
SHARD_SIZE_GB = "0.0001"


def test_cores_are_shared_out():
    assert shares(2, [], 0, [0, 1, 2, 3, 4]) == [
        Share({}, frozenset({0, 2, 4})),
        Share({}, frozenset({1, 3})),
    ]
    assert [share.cores for share in shares(3, [], 0, [4, 5])] == [{4}, {5}, {4}]


def test_devices_come_before_cores():
    found = shares(3, ["0", "GPU-b"], 4, [0, 1])
    assert [share.variables["CUDA_VISIBLE_DEVICES"] for share in found] == ["0", "GPU-b", "0"]
    assert {share.variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] for share in found} == {"0.45"}
    assert all(share.cores is None for share in found)
    with pytest.raises(UsageError, match="4 TPU chips"):
        shares(5, [], 4, [0, 1])
    chips = [share.variables["TPU_VISIBLE_CHIPS"] for share in shares(4, [], 4, [0, 1])]
    assert chips == ["0", "1", "2", "3"]


@dataclass
class Scripted:
    """A process that ends with `code` at its first look, or runs until it is terminated (None)."""

    code: int | None
    terminated: bool = False

    def poll(self) -> int | None:
        return 143 if self.terminated else self.code

    def terminate(self) -> None:
        self.terminated = True


@dataclass
class Fast(Clock):
    """Time passes only by sleeping."""

    now: float = 0.0
    started: list[tuple[float, int]] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def run_scripted(codes: dict[int, list[int]], *, supervised: bool, slots: int = 2, attempts: int = 20):
    """codes: how each worker's starts end. Returns the result, and when each start was."""
    clock = Fast()

    def spawn(worker: int, slot: int) -> Scripted:
        clock.started.append((round(clock.now), worker))
        return Scripted(codes[worker].pop(0))

    policy = Policy(backoff_s=10.0, max_attempts=attempts)
    fleet = LocalFleet(list(codes), slots, spawn, supervised, policy, clock, lambda text: None)
    return fleet.run(), clock.started


def test_without_supervision_each_is_started_once():
    ended, started = run_scripted({0: [0], 1: [75], 2: [-9]}, supervised=False)
    assert ended == Ended(frozenset({0}), {1: 75, 2: -9})
    assert [worker for _, worker in started] == [0, 1, 2]


@pytest.mark.parametrize("code", [75, 143, -9, 1])
def test_what_may_pass_is_started_again_later_and_later(code):
    ended, started = run_scripted({0: [code, code, 0]}, supervised=True)
    assert ended.done == {0}
    assert [when for when, _ in started] == [0, 10, 30]


@pytest.mark.parametrize("code", [2, 65, 76, 78])
def test_what_does_not_pass_is_not(code):
    ended, started = run_scripted({0: [code]}, supervised=True)
    assert ended == Ended(frozenset(), {0: code}) and len(started) == 1


def test_the_tries_are_capped():
    ended, started = run_scripted({0: [-9] * 4}, supervised=True, attempts=3)
    assert ended.failed == {0: -9} and len(started) == 4


def test_no_more_at_once_than_slots():
    running: list[Scripted] = []

    def spawn(worker: int, slot: int) -> Scripted:
        running[:] = [each for each in running if each.code is None]
        assert slot in (0, 1) and len(running) < 2
        running.append(Scripted(None))
        return running[-1]

    clock = Fast()
    clock.sleep = lambda seconds: [setattr(each, "code", 0) for each in running]  # type: ignore[method-assign]
    fleet = LocalFleet(range(7), 2, spawn, False, Policy(), clock, lambda text: None)
    assert fleet.run().done == set(range(7))


def test_a_worker_that_lived_long_has_its_tries_back():
    clock = Fast()
    codes = [-9, -9, -9, 0]

    def spawn(worker: int, slot: int) -> Scripted:
        clock.now += LONGEST_WAIT_S + 1  # it dies half an hour after its start
        return Scripted(codes.pop(0))

    started_at = clock.time
    fleet = LocalFleet([0], 1, spawn, True, Policy(backoff_s=10.0, max_attempts=1), clock, lambda text: None)
    assert fleet.run().done == {0} and started_at() > 4 * LONGEST_WAIT_S


def test_trouble_with_one_start_ends_the_others_first():
    running: list[Scripted] = []

    def spawn(worker: int, slot: int) -> Scripted:
        if worker == 1:
            raise StorageError("cannot write logs/worker_1.log")
        running.append(Scripted(None))
        return running[-1]

    with pytest.raises(StorageError):
        LocalFleet(range(2), 2, spawn, True, Policy(), Fast(), lambda text: None).run()
    assert [each.terminated for each in running] == [True]


def test_logs_that_cannot_be_written(tmp_path):
    (tmp_path / "logs").touch()
    with pytest.raises(StorageError, match="logs"):
        spawner({}, [Share({})], tmp_path / "logs")


def test_a_stop_ends_every_worker_and_starts_none():
    processes = []
    clock = Fast()
    fleet = LocalFleet(range(4), 2, lambda *_: processes.append(Scripted(None)) or processes[-1], True, Policy(),
                       clock, lambda text: None)  # fmt: skip
    clock.sleep = lambda seconds: fleet.stop.set()  # type: ignore[method-assign]
    assert fleet.run() == Ended(frozenset(), {}, stopped=True)
    assert [each.terminated for each in processes] == [True, True]


def test_a_real_process_gets_its_id_its_cores_and_its_log(tmp_path, monkeypatch):
    script = tmp_path / "launch_worker.sh"
    script.write_text(
        '#!/bin/bash\necho "$WORKER_ID $UPLOAD_TO_GCS $X"; grep Cpus_allowed_list /proc/self/status\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr("qwen_jax.fleet.local.CHECKOUT", tmp_path)
    core = min(os.sched_getaffinity(0))
    spawn = spawner(
        {**os.environ, "GCS_BUCKET": "b"}, [Share({"X": "a b"}, frozenset({core}))], tmp_path / "logs"
    )
    assert spawn(7, 0).wait(10) == 0
    name, cores = (tmp_path / "logs" / "worker_7.log").read_text().splitlines()
    assert (name, cores.split()) == ("7 true a b", ["Cpus_allowed_list:", str(core)])


# The environment's Python: this one; a worker whose file is in $KILLS dies at the failpoint that it names, once.
PYTHON = f"""
if [ "$1" = extract_activations.py ] && [ -e "$KILLS/$WORKER_ID" ]; then
    export QWEN_JAX_FAILPOINT=$(cat "$KILLS/$WORKER_ID")
    rm "$KILLS/$WORKER_ID"
fi
exec "{sys.executable}" "$@"
"""
KILLS = ("shard_uploaded", "metadata_stored:2", "checkpoint_stored:2")
"""Where the first workers die."""


def calm_fleet(inputs: tuple[Path, Path, Path], root: Path, server: FakeGcs, workers: int) -> None:
    """Runs all to their end in the bucket `calm`, two at once, forked."""
    workspace, log = CloudWorkspace(*inputs, root / "calm", server=server), root / "calm.log"

    def spawn(worker: int, slot: int) -> Start:
        stream = root / f"stream_{worker:03d}.jsonl"
        flags = ("--worker_id", str(worker), "--gcs_bucket", "calm", "--shard_size_gb", SHARD_SIZE_GB)
        command = workspace.command(*flags, stream=stream)
        return Start(command, workspace.environment(), log)

    fleet = LocalFleet(range(workers), 2, spawn, False, Policy(), Clock(), lambda text: None)
    assert fleet.run().done == set(range(workers)), log.read_text()[-3000:]


def fleet_environment(inputs: tuple[Path, Path, Path], root: Path, server: FakeGcs) -> dict[str, str]:
    """Variables for the shell scripts: an environment that is ready, and the settings of the calm fleet."""
    write_script(root / "env" / "bin" / "python", PYTHON)
    checksum = subprocess.check_output(["cksum"], stdin=(ROOT / "requirements.txt").open(), text=True)
    (root / "env" / ".installed").write_text(f"jax {checksum}")
    (root / "kills").mkdir()
    for worker, failpoint in enumerate(KILLS):
        (root / "kills" / str(worker)).write_text(failpoint)
    return os.environ | {
        **{"VENV_DIR": str(root / "env"), "JAX_PACKAGE": "jax", "KILLS": str(root / "kills")},
        **{"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PROGRESS_INTERVAL_S": "60"},
        **{"GCS_BUCKET": "bucket", "STORAGE_EMULATOR_HOST": server.url},
        **{"MODEL_PATH": str(inputs[0]), "DATASET_DIR": str(root), "COMPILATION_CACHE_DIR": str(inputs[2])},
        **{"OUTPUT_DIR": str(root / "activations"), "CHECKPOINT_DIR": str(root / "checkpoints")},
        **{"MAX_SEQ_LENGTH": "256", "SHARD_SIZE_GB": SHARD_SIZE_GB, "BATCH_SIZE": "2"},
    }


@pytest.mark.slow  # test_slurm.py proves the same of four workers
def test_a_fleet_of_eight_with_kills(inputs, tmp_path, workers=8):
    """The real scripts: with kills they leave in the bucket what undisturbed workers leave; the monitor sees it."""
    write_streams(inputs[1], tmp_path, workers)
    with FakeGcs(["bucket", "calm"]) as server:
        calm_fleet(inputs, tmp_path, server, workers)
        environment = fleet_environment(inputs, tmp_path, server)
        flags = ("--engine", "local", "--num_workers", str(workers), "--parallel", "2", "--supervise")
        command = [ROOT / "launch_all_workers.sh", *flags, "--backoff_s", "0.01"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("killed by signal 9") == len(KILLS) and not list(
            (tmp_path / "kills").iterdir()
        )
        left = server.tree("bucket")
        records = [
            ProgressRecord.parse(left.pop(name)) for name in sorted(left) if name.endswith("/progress.json")
        ]
        calm = server.tree("calm")
        assert left == {name: data.replace(b"gs://calm/", b"gs://bucket/") for name, data in calm.items()}
        look = [ROOT / "check_all_workers.sh", str(workers), "--bucket", "gs://bucket", "--json"]
        seen = subprocess.run(look, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert seen.returncode == 0, seen.stderr
    assert {(each["state"], each["durable"]) for each in json.loads(seen.stdout)} == {("completed", TASKS)}
    assert [(record.worker_id, record.status) for record in records] == [(n, "ended") for n in range(workers)]
    documents = [data for name, data in left.items() if name.endswith("/metadata.json")]
    totals = [json.loads(data)["totals"] for data in documents]
    assert [each["samples"] + each["skipped"] for each in totals] == [TASKS] * workers
    assert sum(each["shards"] for each in totals) > workers


def write_streams(source: Path, folder: Path, workers: int) -> None:
    """A stream for each worker: the same tasks, begun at another one."""
    lines = source.read_text().splitlines()
    for worker in range(workers):
        turned = (lines[worker:] + lines[:worker])[:TASKS]
        (folder / f"stream_{worker:03d}.jsonl").write_text("\n".join(turned) + "\n")
