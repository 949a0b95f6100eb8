"""launch_all_workers.sh: what gcloud is given, and what the remote shell makes of it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax.model.published import config_fields
from tests.few import few
from tests.scripts.conftest import ROOT, Call, Fakes, setting_variables, write_script
from tests.waiting import until

SCRIPT = ROOT / "launch_all_workers.sh"
HARD = "a b\t'c'\"d\" $HOME $(touch owned) `touch owned`;touch owned&|<>*?[x]!{}\\ ~ # =\u00e9"
BESIDE_FLAGS = {"JAX_PACKAGE", "HF_TOKEN"}
# The launcher sets UPLOAD_TO_GCS itself.
PASSED_ON = sorted({*setting_variables(), *BESIDE_FLAGS} - {"UPLOAD_TO_GCS"})
# Values of variables that are no free text.
TYPED = {
    **{
        "BATCH_SIZE": "8",
        "SHARD_SIZE_GB": "0.5",
        "MAX_SEQ_LENGTH": "77",
        "MAX_SAMPLES": "5",
    },
    **{"MAX_BAD_RECORDS": "3", "LAYERS_TO_EXTRACT": "0 3", "ACTIVATION_TYPE": "mlp attn", "SKIP_FIRST": "1"},
    **{"KEEP_TOKENS": "role:test_input,answer", "DTYPE": "float32", "ACTIVATION_DTYPE": "float32"},
    **{"ATTENTION": "blocked", "MODEL_PARALLEL": "2", "PROMPT_FORMAT": "json", "OVERLONG": "skip"},
    **dict.fromkeys(("INCLUDE_EMBEDDING", "INCLUDE_ANSWER", "SKIP_SPECIAL_TOKENS", "CHAT_TEMPLATE"), "true"),
    **{"DELETE_LOCAL_AFTER_UPLOAD": "true", "VERBOSE": "true"},
    **{"GCS_RETRY_BUDGET_S": "7", "PROGRESS_INTERVAL_S": "9"},
    **{"ROLLOUT": "0", "ROLLOUT_TEMPERATURE": "0", "ROLLOUT_SEED": "3"},
}


def every_setting() -> dict[str, str]:
    """A value for each variable that is passed on, as hard to quote as it may be; but for the bucket's."""
    return {name: TYPED.get(name, f"{name} {HARD}") for name in PASSED_ON if name != "GCS_BUCKET"}


def with_packages(folder: Path) -> str:
    """A VENV_DIR whose Python is this one."""
    write_script(folder / "bin" / "python", f'exec "{sys.executable}" "$@"')
    return str(folder)


def launch(
    fakes: Fakes, *arguments: str, bucket: str = "bucket", **variables: str
) -> subprocess.CompletedProcess:
    # Not the environment of this checkout, where a demo has made one: by default a bare control machine.
    bare = {"VENV_DIR": str(fakes.folder / "no_environment")}
    environment = fakes.environment(GCS_BUCKET=bucket, **bare | variables)
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, cwd=fakes.folder.parent, capture_output=True, text=True
    )


@pytest.fixture
def gcloud(fakes) -> Fakes:
    fakes.add("gcloud", "")
    return fakes


def given(call: Call) -> tuple[str, str, str]:
    """VM, zone and remote command of one gcloud call."""
    *start, name, zone_flag, zone, command_flag, command = call.arguments
    assert start == ["compute", "tpus", "tpu-vm", "ssh"]
    assert (zone_flag, command_flag) == ("--zone", "--command")
    return name, zone, command


def test_defaults(gcloud):
    done = launch(gcloud)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "32 of 32 workers started"
    calls = [given(call) for call in gcloud.calls("gcloud")]
    assert sorted(name for name, _, _ in calls) == sorted(f"tpu-worker-{i}" for i in range(32))
    assert {zone for _, zone, _ in calls} == {"us-central2-b"}
    assert all(command.startswith("cd qwen && ") for _, _, command in calls)


@pytest.mark.wide
def test_a_model_that_cannot_fit_is_said_before_machines_are_paid_for(gcloud, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_fields("72B")))
    variables = {"NUM_WORKERS": "1", "MODEL_PATH": str(tmp_path), "VENV_DIR": with_packages(tmp_path / "env")}
    done = launch(gcloud, "--dry_run", **variables)
    assert done.returncode == 0 and f"warning: {tmp_path} on v4-8: needs about " in done.stderr
    (tmp_path / "config.json").write_text(json.dumps(config_fields("0.5B")))
    assert "warning" not in launch(gcloud, "--dry_run", **variables).stderr


@pytest.mark.wide
def test_values_of_any_kind_reach_gcloud(gcloud):
    launch(gcloud, NUM_WORKERS="1", ZONE=HARD, NAME_PATTERN=f"{HARD}-{{}}-vm")
    name, zone, _ = given(gcloud.calls("gcloud")[0])
    assert name == f"{HARD}-{{}}-vm".replace("{}", "0")
    assert zone == HARD


def test_dry_run_prints_exactly_what_would_be_run(gcloud):
    settings = every_setting() | {"HF_TOKEN": ""}
    settings |= {"NUM_WORKERS": "2", "ZONE": HARD, "NAME_PATTERN": HARD, "REMOTE_DIR": HARD}
    shown = launch(gcloud, "--dry_run", bucket=HARD, **settings)
    assert shown.returncode == 0
    assert gcloud.calls() == []
    subprocess.run(["bash", "-c", shown.stdout], env=gcloud.environment(), check=True)
    launch(gcloud, bucket=HARD, **settings)
    calls = [call.arguments for call in gcloud.calls("gcloud")]
    assert len(calls) == 4
    assert sorted(calls[:2]) == sorted(calls[2:])
    assert not list(gcloud.folder.parent.glob("owned"))


@pytest.fixture
def remote(tmp_path, fakes, gcloud):
    """Runs remote commands in the home folder of a VM whose checkout has a recording launch_worker.sh."""
    home = tmp_path / "home"

    def run(remote_dir: str = "qwen", **settings: str) -> list[Call]:
        fakes.recorded(home / remote_dir / "launch_worker.sh", 'echo "from the worker"')
        launch(gcloud, REMOTE_DIR=remote_dir, NUM_WORKERS="3", **settings)
        for call in gcloud.calls("gcloud"):
            done = subprocess.run(
                ["bash", "-c", given(call)[2]],
                input=call.input,
                env=fakes.environment(),
                cwd=home,
                capture_output=True,
                timeout=10,
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        return wait_for_calls(fakes, "launch_worker.sh", 3)

    return run


def wait_for_calls(fakes: Fakes, program: str, count: int) -> list[Call]:
    """Remote workers run in the background; waits until all of them have been called."""
    until(lambda: len(fakes.calls(program)) >= count)
    return fakes.calls(program)


def test_the_remote_command_starts_the_worker_with_every_setting(remote, tmp_path):
    settings = every_setting()
    calls = remote("my $HOME;'q\"wen dir", bucket=HARD, **settings)
    wanted = settings | {"GCS_BUCKET": HARD, "UPLOAD_TO_GCS": "true"}
    for call in calls:
        assert {name: call.environment.get(name) for name in wanted} == wanted
        assert call.arguments == []
    assert sorted(int(call.environment["TPU_WORKER_ID"]) for call in calls) == list(range(3))
    assert not list(tmp_path.rglob("owned"))


@pytest.mark.wide
def test_unset_variables_stay_unset(remote):
    for call in remote():
        assert not set(call.environment) & (set(PASSED_ON) - {"GCS_BUCKET"})


# gcloud on a VM: an archive of the checkout and the streams are in the folder $BUCKET.
GCLOUD_ON_A_VM = """
case "$1 $2" in
"storage cat") cat "$BUCKET/${3#gs://}" ;;
"storage cp") cp "$BUCKET/${3#gs://}" "$4" ;;
esac
"""


def test_a_bare_vm_fetches_the_checkout_and_its_own_stream(fakes, gcloud, tmp_path):
    """Also after a first download that was cut off."""
    bucket, checkout, home = tmp_path / "bucket", tmp_path / "checkout", tmp_path / "home"
    fakes.recorded(checkout / "launch_worker.sh")
    for folder in (bucket, bucket / "streams", home):
        folder.mkdir()
    subprocess.run(["tar", "-czf", bucket / "code 1.tar.gz", "-C", checkout, "."], check=True)
    for worker in range(3):
        (bucket / "streams" / f"stream_{worker:03d}.jsonl").write_text(f"lines of {worker}")
    flags = ("--workers", "2", "--code_url", "gs://code 1.tar.gz", "--streams_url", "gs://streams/")
    launch(gcloud, *flags, DATASET_DIR="my streams", REMOTE_DIR="q d")
    (call,) = gcloud.calls("gcloud")
    fakes.add("gcloud", GCLOUD_ON_A_VM)
    command, environment = ["bash", "-c", given(call)[2]], fakes.environment(BUCKET=str(bucket))
    archive = bucket / "code 1.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-9])
    assert subprocess.run(command, env=environment, cwd=home, capture_output=True).returncode != 0
    assert not (home / "q d").exists()
    archive.write_bytes(whole)
    for start in (1, 2):
        subprocess.run(command, env=environment, cwd=home, check=True)
        assert len(wait_for_calls(fakes, "launch_worker.sh", start)) == start
    assert [path.name for path in (home / "q d" / "my streams").iterdir()] == ["stream_002.jsonl"]
    assert (home / "q d" / "my streams" / "stream_002.jsonl").read_text() == "lines of 2"
    # The launcher's own call, the one that was cut off, then one of each kind: the last start finds everything.
    assert [each.arguments[1] for each in fakes.calls("gcloud")[1:]] == ["cat", "cat", "cp"]


@pytest.mark.wide
def test_each_worker_has_its_log_and_a_second_start_keeps_it(remote, tmp_path):
    log = tmp_path / "home" / "qwen" / "logs" / "worker_2.log"
    write_script(log, "")
    log.write_text("before\n")
    remote()
    until(lambda: "from the worker" in log.read_text())
    assert log.read_text() == "before\nfrom the worker\n"


@pytest.mark.wide
@pytest.mark.parametrize("missing", ["folder", "script"])
def test_a_vm_without_the_checkout_is_no_success(gcloud, tmp_path, missing):
    launch(gcloud, NUM_WORKERS="1")
    if missing == "script":
        (tmp_path / "qwen").mkdir()
    command = given(gcloud.calls("gcloud")[0])[2]
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert ("qwen" if missing == "folder" else "launch_worker.sh") in done.stderr


@pytest.mark.wide
def test_workers_that_gcloud_cannot_start_are_named(fakes):
    fakes.add("gcloud", 'case "$5" in *-1 | *-3) echo "no such VM" >&2; exit 1 ;; esac')
    done = launch(fakes, NUM_WORKERS="5")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "3 of 5 workers started"
    assert "not started: 1 3;" in done.stderr
    assert len(fakes.calls("gcloud")) == 5


@pytest.mark.wide
def test_gcloud_does_not_eat_the_input(fakes):
    fakes.add("gcloud", "cat >/dev/null")
    assert launch(fakes, NUM_WORKERS="3").stdout.splitlines()[-1] == "3 of 3 workers started"


ENGINES = {
    **{"gcloud": "gcloud", "kubernetes": "kubectl", "skypilot": "sky"},
    **{"slurm": "sbatch", "local": "nothing"},
}


UNREADABLE = [
    ("MAX_SEQ_LENGTH", "abc", "whole number"),
    ("INCLUDE_ANSWER", "maybe", "true or false"),
    ("OVERLONG", "cut", "choose from"),
    ("KEEP_TOKENS", "most", "keep_tokens"),
    ("PROGRESS_INTERVAL_S", "often", "seconds"),
    ("GCS_RETRY_BUDGET_S", "nan", "seconds"),
]


@pytest.mark.parametrize(
    "engine, tool, name, value, words",
    few(
        [
            *((engine, tool, *UNREADABLE[0]) for engine, tool in ENGINES.items()),
            *(("gcloud", "gcloud", *each) for each in UNREADABLE[1:]),
        ],
        2,
    ),
)
def test_a_setting_that_no_worker_can_read_starts_nothing(fakes, tmp_path, engine, tool, name, value, words):
    """No engine may make machines for workers that each end with exit code 2."""
    fakes.add(tool, "")
    variables = {name: value, "IMAGE": "image", "VENV_DIR": with_packages(tmp_path / "env")}
    for flags in ((), ("--dry_run",)):
        done = launch(fakes, "--engine", engine, *flags, **variables)
        assert (done.returncode, done.stdout) == (2, "")
        assert (name in done.stderr or name.lower() in done.stderr) and words in done.stderr
    assert fakes.calls() == []


def test_without_packages_settings_are_left_to_the_workers(gcloud, tmp_path):
    """A control machine needs none; a worker that cannot read its settings records that."""
    write_script(tmp_path / "bare" / "bin" / "python", f'exec "{sys.executable}" -S "$@"')
    done = launch(gcloud, "--workers", "3", VENV_DIR=str(tmp_path / "bare"), MAX_SEQ_LENGTH="abc")
    assert done.returncode == 0 and "settings are left to the workers to check: no numpy here" in done.stderr


@pytest.mark.wide
@pytest.mark.parametrize("flags", [(), ("--supervise",)])
def test_a_token_is_forwarded_and_never_printed(gcloud, flags):
    shown = launch(gcloud, "--workers", "3", "--dry_run", *flags, HF_TOKEN="hf_secret")
    assert "hf_secret" not in shown.stdout + shown.stderr and "read -r HF_TOKEN" in shown.stdout
    done = launch(gcloud, "--workers", "3", HF_TOKEN="hf_secret", JAX_PACKAGE="jax[tpu]==1.2")
    call = gcloud.calls("gcloud")[0]
    assert "hf_secret" not in " ".join(call.arguments), "a list of processes shows it"
    assert call.input == b"hf_secret\n" and "JAX_PACKAGE='jax[tpu]==1.2'" in given(call)[2]
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.wide
def test_a_token_of_two_lines_is_refused(gcloud):
    done = launch(gcloud, "--workers", "3", HF_TOKEN="hf_one\nhf_two")
    assert done.returncode == 2 and "HF_TOKEN must be one line" in done.stderr
    assert gcloud.calls() == []


@pytest.mark.wide
def test_further_flags_reach_gcloud_as_a_shell_reads_them(gcloud):
    create = "--network 'my net' --labels=a=b --service-account x@y --internal-ips"
    flags = ("--workers", "3", f"--gcloud_create_flags={create}", "--gcloud_ssh_flags=--tunnel-through-iap")
    shown = launch(gcloud, *flags, "--supervise", "--dry_run").stdout.splitlines()
    for kind, line in zip(("create", "ssh"), shown, strict=True):
        words = shlex.split(line)
        wanted = shlex.split(create) if kind == "create" else ["--tunnel-through-iap"]
        at = words.index(wanted[0])
        assert kind in words and words[at : at + len(wanted)] == wanted
    launch(gcloud, "--workers", "3", GCLOUD_SSH_FLAGS="--ssh-flag='-o ConnectTimeout=9'")
    assert "--ssh-flag=-o ConnectTimeout=9" in gcloud.calls("gcloud")[0].arguments


# Writes down how many run; but for the first, none ends before three have run at once.
PARALLEL = """
cd "$CALLS/.."
mkdir "running-$$"
count=$(find . -maxdepth 1 -name 'running-*' | wc -l)
echo "$count" >>at-once
if [ "$count" -ge 3 ]; then touch reached; fi
deadline=$((SECONDS + 20))
until [ "$(wc -l <at-once)" = 1 ] || [ -e reached ] || ((SECONDS > deadline)); do sleep 0.02; done
rmdir "running-$$"
"""


@pytest.mark.wide
def test_ssh_is_parallel_up_to_the_limit(fakes, tmp_path):
    """The first call is alone: it makes the key."""
    fakes.add("gcloud", PARALLEL)
    done = launch(fakes, "--num_workers", "8", "--parallel", "3")
    assert done.returncode == 0
    at_once = [int(line) for line in (tmp_path / "at-once").read_text().split()]
    assert at_once[0] == 1 and max(at_once) == 3 and len(at_once) == 8


SUPERVISED = """
case "$*" in
"storage cat "*checkpoint*) echo '{"worker_id": 3, "status": "completed"}' ;;
"storage cat "*) [ -z "$RECORD" ] || echo "$RECORD" ;;
*" list "*) echo '[{"name": "tpu-worker-3", "state": "READY"}, {"name": "tpu-worker-4", "state": "READY"}]' ;;
esac
"""


@pytest.mark.wide
@pytest.mark.parametrize("workers, code, last", [("3", 0, "1 of 1"), ("3-4", 1, "1 of 2")])
def test_supervision_ends_with_the_code_of_its_result(fakes, workers, code, last):
    """Worker 3 is complete; worker 4 fails for good as soon as it has been started."""
    record = (
        '{"worker_id": 4, "status": "failed", "exit_code": 65, "message": "bad", "updated_at": 99999999999}'
    )
    fakes.add("gcloud", SUPERVISED)
    flags = ("--supervise", "--workers", workers, "--poll_s", "0.05", "--backoff_s", "0.01")
    done = launch(fakes, *flags, RECORD=record)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == f"{last} workers completed"
    assert ("given up: 4" in done.stderr) == (code == 1)


@pytest.mark.parametrize(
    "arguments, variables, words",
    few(
        [
            ((), {"bucket": "file:///bucket"}, "name of a Cloud Storage bucket"),
            ((), {"bucket": "gs://bucket/some/prefix"}, "name of a Cloud Storage bucket"),
            (("--gcloud_ssh_flags=it's",), {}, "not what a shell reads"),
            (("--gcloud_create_flags", "--internal-ips --network n"), {}, "write it in one word with ="),
            ((), {"bucket": ""}, "set GCS_BUCKET"),
            (("--dry_run",), {"bucket": ""}, "set GCS_BUCKET"),
            ((), {"NUM_WORKERS": "0"}, "NUM_WORKERS"),
            ((), {"NUM_WORKERS": "three"}, "NUM_WORKERS"),
            ((), {"NUM_WORKERS": "08"}, "NUM_WORKERS"),
            ((), {"NAME_PATTERN": "one-name"}, "NAME_PATTERN"),
            (("5",), {}, "unrecognized arguments: 5"),
            (("--dry_run", "5"), {}, "unrecognized arguments: 5"),
            (("--workers", "7-3"), {}, "3,7-9"),
            (("--workers", "a"), {}, "3,7-9"),
            (("--engine", "kubernetes", "--workers", "3"), {"IMAGE": "x"}, "--num_workers"),
            (("--engine", "kubernetes", "--supervise"), {}, "leave --supervise out"),
        ],
        5,
    ),
)
def test_wrong_calls_start_nothing(gcloud, arguments, variables, words):
    done = launch(gcloud, *arguments, **variables)
    assert done.returncode == 2
    assert words in done.stderr
    assert gcloud.calls() == [] and done.stdout == ""


@pytest.mark.wide
def test_without_gcloud(fakes, tmp_path):
    (tmp_path / "python3").symlink_to(sys.executable)
    environment = fakes.environment(GCS_BUCKET="bucket") | {"PATH": str(tmp_path)}
    done = subprocess.run(["/bin/bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "gcloud was not found" in done.stderr


def test_help(fakes):
    done = subprocess.run([SCRIPT, "--help"], env=fakes.environment(), capture_output=True, text=True)
    assert done.returncode == 0
    assert "REMOTE_DIR" in done.stdout and "set -e" not in done.stdout


@pytest.mark.wide
def test_the_dry_run_is_one_line_a_worker(gcloud):
    lines = launch(gcloud, "--dry_run", NUM_WORKERS="3").stdout.splitlines()
    assert [shlex.split(line)[5] for line in lines] == ["tpu-worker-0", "tpu-worker-1", "tpu-worker-2"]
