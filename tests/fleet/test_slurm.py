"""The engine of Slurm, on a real cluster of one node."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_jax.fleet.local import LocalFleet
from qwen_jax.fleet.supervise import Clock, Policy
from qwen_jax.ledger.checkpoint import SeenCheckpoint, seen_checkpoint
from qwen_jax.ledger.schema import IN_PROGRESS
from tests.fake_gcs import FakeGcs
from tests.fleet.slurm_cluster import Cluster, missing_programs, one_node
from tests.run_worker.starts import AS_INSTALLED, Start
from tests.scripts.conftest import ROOT, write_script
from tests.scripts.test_launch_all import HARD
from tests.waiting import until

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"Slurm is not here: no {', '.join(missing_programs())}"
)
KILLED, REQUEUED, CANCELLED, SPARED = range(4)
"""What happens to which worker."""
TASKS = {KILLED: 5, REQUEUED: 16, CANCELLED: 16, SPARED: 3}
"""Those that are stopped in the middle have enough for that."""
WORKERS = len(TASKS)
MODEL = ROOT / "examples" / "demo" / "model"
STREAM = ROOT / "tests" / "reading" / "streams" / "stream_000.jsonl"
"""Its tasks are long enough for a shard each."""
# The environment's Python: this one, with what users install; a worker whose file is in $KILLS dies at the failpoint
# that it names, once.
PYTHON = f"""
export PYTHONPATH="{AS_INSTALLED}${{PYTHONPATH:+:$PYTHONPATH}}"
if [ "$1" = extract_activations.py ] && [ -e "$KILLS/$3" ]; then
    export QWEN_JAX_FAILPOINT=$(cat "$KILLS/$3")
    rm "$KILLS/$3"
fi
exec "{sys.executable}" "$@"
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with one_node() as cluster:
        yield cluster


def checkout(folder: Path) -> Path:
    """The checkout's files, which a test may replace."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("activations", "checkpoints", "data", "logs") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


def submit(folder: Path, environment: dict[str, str], *flags: str) -> str:
    """Starts the engine in a checkout; returns the job's number."""
    command = [folder / "launch_all_workers.sh", "--engine", "slurm", "--num_workers", str(WORKERS), *flags]
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "workers handed to Slurm" in done.stdout
    return done.stdout.split()[3]  # Submitted batch job N


def fleet_settings(root: Path, server: FakeGcs) -> dict[str, str]:
    """The worker's variables: the demo's model, and a stream of some tasks for each worker."""
    (root / "streams").mkdir()
    lines = STREAM.read_text().splitlines()
    for worker, tasks in TASKS.items():
        path = root / "streams" / f"stream_{worker:03d}.jsonl"
        path.write_text("\n".join(lines[worker : worker + tasks]) + "\n")
    return {
        **{"MODEL_PATH": str(MODEL), "DATASET_DIR": str(root / "streams"), "BATCH_SIZE": "2"},
        **{
            "MAX_SEQ_LENGTH": "1024",
            "SHARD_SIZE_GB": "0.0001",
            "LAYERS_TO_EXTRACT": "0",
            "COMPILATION_CACHE_DIR": str(root / "cache"),
        },
        "STORAGE_EMULATOR_HOST": server.url,
    }


def calm_fleet(root: Path, settings: dict[str, str]) -> None:
    """Runs all to their end in the bucket `calm`, two at once, forked."""
    folders = {name.upper(): str(root / "calm" / name) for name in ("output_dir", "checkpoint_dir")}
    variables = settings | folders | {"UPLOAD_TO_GCS": "true", "GCS_BUCKET": "calm"}

    def spawn(worker: int, slot: int) -> Start:
        command = [sys.executable, "extract_activations.py", "--worker_id", str(worker)]
        return Start(command, variables, root / "calm.log")

    fleet = LocalFleet(range(WORKERS), 2, spawn, False, Policy(), Clock(), lambda text: None)
    assert fleet.run().done == set(range(WORKERS)), (root / "calm.log").read_text()[-3000:]


def fleet_environment(root: Path, settings: dict[str, str], slurm: Cluster) -> dict[str, str]:
    """For the shell scripts: an environment that is ready, on the cluster."""
    write_script(root / "env" / "bin" / "python", PYTHON)
    wanted = subprocess.check_output(
        ["bash", "-c", "cat requirements.txt deploy/constraints.txt | cksum"], cwd=ROOT, text=True
    )
    (root / "env" / ".installed").write_text(f"jax {wanted}")
    (root / "kills").mkdir()
    (root / "kills" / str(KILLED)).write_text("shard_uploaded:2")
    ready = {"VENV_DIR": str(root / "env"), "JAX_PACKAGE": "jax", "KILLS": str(root / "kills")}
    return os.environ | slurm.variables | settings | ready | {"GCS_BUCKET": "bucket"}


def pause_when_begun(folder: Path, job: str, workers: set[int]) -> None:
    """Stops each in the middle of its run: it has stored a shard, and is not done."""
    left = dict.fromkeys(workers, 0)

    def pause_some() -> bool:
        for worker in list(left):
            found = seen(folder, worker)
            if found.status and not left[worker]:
                left[worker] = process_of(job, worker)
            if found.shards:
                os.kill(left.pop(worker), signal.SIGSTOP)
        return not left

    until(pause_some, seconds=300, every=0.05)
    assert {seen(folder, worker).status for worker in workers} == {IN_PROGRESS}


def seen(folder: Path, worker: int) -> SeenCheckpoint:
    path = folder / "checkpoints" / f"checkpoint_worker_{worker}.json"
    return seen_checkpoint(path.read_bytes(), worker) if path.exists() else SeenCheckpoint(0, 0, "")


def process_of(job: str, worker: int) -> int:
    """The process of a task that computes; 0 before there is one."""
    command = f"extract_activations.py\0--worker_id\0{worker}\0".encode()
    found = (
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if command in about(folder / "cmdline")
        and f"\0SLURM_ARRAY_JOB_ID={job}\0".encode() in about(folder / "environ")
    )
    return next(found, 0)


def about(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # it has ended, or is somebody else's
        return b""


def test_a_fleet_that_is_requeued_killed_and_cancelled(slurm, tmp_path):
    """It leaves in the bucket what undisturbed workers leave; the monitor sees it."""
    folder, log = checkout(tmp_path / "checkout"), "logs/worker_{}.log"
    with FakeGcs(["bucket", "calm"]) as server:
        settings = fleet_settings(tmp_path, server)
        calm_fleet(tmp_path, settings)
        environment = fleet_environment(tmp_path, settings, slurm)
        job = submit(folder, environment)
        pause_when_begun(folder, job, {REQUEUED, CANCELLED})
        slurm.call("scontrol", "requeue", f"{job}_{REQUEUED}")
        slurm.until(lambda: slurm.states(job)[KILLED].startswith("PENDING"), seconds=60)
        slurm.until(lambda: slurm.states(job)[REQUEUED].startswith("PENDING"), seconds=60)
        slurm.start_soon(f"{job}_{REQUEUED}")
        slurm.until(lambda: slurm.states(job)[REQUEUED].startswith("COMPLETED"), seconds=300)
        slurm.call("scancel", job)
        slurm.until(lambda: set(slurm.states(job)) and is_over(slurm, job), seconds=60)
        assert slurm.states(job)[CANCELLED].startswith("CANCELLED")
        assert "SIGTERM" in (folder / log.format(CANCELLED)).read_text()
        again = submit(folder, environment)
        slurm.until(lambda: all(each.startswith("COMPLETED") for each in slurm.states(again).values()), 300)
        assert left_in(server, "bucket") == left_in(server, "calm")
        for place in ((), ("--bucket", "gs://bucket")):
            look = [folder / "check_all_workers.sh", str(WORKERS), *place]
            shown = subprocess.run(look, env=environment, cwd=folder, capture_output=True, text=True)
            assert shown.returncode == 0, shown.stderr
            assert f"Total: {sum(TASKS.values())} samples" in shown.stdout


def left_in(server: FakeGcs, bucket: str) -> dict[str, bytes]:
    """All but the records, which have the time; each bucket's name reads the same."""
    return {
        name: data.replace(f"gs://{bucket}/".encode(), b"gs://")
        for name, data in server.tree(bucket).items()
        if not name.endswith("/progress.json")
    }


def is_over(slurm: Cluster, job: str) -> bool:
    return all(state.startswith(("COMPLETED", "CANCELLED")) for state in slurm.states(job).values())


# A worker that ends with the exit code that $ENDS has for it; the last one runs until SIGTERM, as a worker does.
SCRIPTED = """
printf '%s' "$UPLOAD_TO_GCS $MODEL_PATH" >"settings_$1"
ends=($ENDS)
[ -e mended ] && exit 0
case ${ends[$1]} in
TERM) trap 'exit 143' TERM; touch up; sleep 300 & wait $! ;;
KILL) kill -KILL $$ ;;
*) exit "${ends[$1]}" ;;
esac
"""
WAITS, HELD, FAILED = "PENDING BeginTime", "PENDING job requeued in held state", "FAILED NonZeroExitCode"
ENDS = {
    **{"0": "COMPLETED None", "1": FAILED, "76": FAILED},
    **{"2": HELD, "65": HELD, "78": HELD},
    **{"75": WAITS, "KILL": WAITS, "TERM": WAITS},
}


def test_what_follows_an_end(slurm, fakes, tmp_path):
    folder = checkout(tmp_path / "checkout")
    (folder / "launch_worker.sh").unlink()
    write_script(folder / "launch_worker.sh", SCRIPTED)
    variables = {"ENDS": " ".join(ENDS), "MODEL_PATH": HARD, "WORKER_ID": "0", "GCS_BUCKET": "bucket"}
    environment = fakes.environment(**variables) | slurm.variables
    job = submit(folder, environment, "--num_workers", str(len(ENDS)))
    until((folder / "up").exists, seconds=300)
    # As Slurm does before a time limit: to the script alone.
    slurm.call("scancel", "--batch", "--signal=TERM", f"{job}_{len(ENDS) - 1}")
    wanted = dict(enumerate(ENDS.values()))
    slurm.until(lambda: slurm.states(job) == wanted, seconds=300)
    assert {(folder / f"settings_{task}").read_text() for task in wanted} == {f"true {HARD}"}
    log = (folder / "logs" / "worker_4.log").read_text()
    assert list(ENDS)[4] == "65" and "exit code 65: requeuehold" in log
