"""launch_all_workers.sh with the engines that place and restart workers themselves, and on this machine."""

import base64
import json
import os
import shlex
import shutil
import signal
import subprocess

import kubernetes_validate
import pytest
import yaml

from qwen_jax.accelerators import TPUS
from qwen_jax.fleet.kubernetes import node_selector
from qwen_jax.fleet.worker_variables import PASSED_ON, PLACES, SECRETS
from tests.few import few
from tests.scripts.conftest import ROOT, Fakes, write_script
from tests.scripts.test_launch_all import every_setting, launch
from tests.waiting import until

SETTINGS = {name: value for name, value in every_setting().items() if name not in (*PLACES, *SECRETS)}
# What kubectl is given is gone when it returns.
KEEP_THE_OVERLAY = (
    'cp "$3/kustomization.yaml" "$CALLS/../kustomization.yaml"; echo job.batch/extraction created\n'
)


@pytest.mark.wide
def test_sky_gets_one_call_for_all(fakes):
    fakes.add("sky", "")
    done = launch(fakes, "--engine", "skypilot", "--num_workers", "5", bucket="gs://bucket/", BATCH_SIZE="8")
    assert done.returncode == 0, done.stderr
    (call,) = fakes.calls("sky")
    assert call.arguments[:2] == ["jobs", "launch"] and call.arguments[-1] == "deploy/skypilot/worker.yaml"
    assert call.arguments[call.arguments.index("--num-jobs") + 1] == "5"
    values = [
        value for flag, value in zip(call.arguments, call.arguments[1:], strict=False) if flag == "--env"
    ]
    assert sorted(values) == ["BATCH_SIZE=8", "GCS_BUCKET=bucket"]
    # workdir and task file are relative to the checkout.
    assert call.environment["PWD"] == str(ROOT)


@pytest.mark.wide
def test_sky_gets_one_call_for_each_chosen_worker(fakes):
    fakes.add("sky", "")
    assert {*SETTINGS, *PLACES, *SECRETS, "GCS_BUCKET"} == set(PASSED_ON)
    settings = SETTINGS | {"HF_TOKEN": "hf_secret"}
    assert launch(fakes, "--engine", "skypilot", "--workers", "3,7-8", **settings).returncode == 0
    calls = [call.arguments for call in fakes.calls("sky")]
    assert [arguments[arguments.index("--name") + 1] for arguments in calls] == [
        *("extraction-3", "extraction-7", "extraction-8")
    ]
    assert all("--num-jobs" not in arguments for arguments in calls)
    assert "WORKER_ID=7" in calls[1]
    assert {f"{name}={value}" for name, value in SETTINGS.items()} <= set(calls[1])
    assert calls[1][calls[1].index("--secret") + 1] == "HF_TOKEN" and "hf_secret" not in " ".join(calls[1])
    assert fakes.calls("sky")[1].environment["HF_TOKEN"] == "hf_secret"


@pytest.mark.wide
def test_kubectl_gets_the_base_with_these_workers(fakes):
    fakes.add("kubectl", KEEP_THE_OVERLAY)
    variables = {"IMAGE": "registry:5000/name", "HF_TOKEN": "hf_secret"}
    done = launch(fakes, "--engine", "kubernetes", "--num_workers", "64", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "job.batch/extraction created"
    (call,) = fakes.calls("kubectl")
    assert call.arguments[:2] == ["apply", "-k"]
    overlay = json.loads((fakes.folder.parent / "kustomization.yaml").read_text())
    assert json.loads(overlay["patches"][0]["patch"])["spec"]["completions"] == 64
    assert overlay["images"][0]["newName"] == "registry:5000/name"
    assert overlay["secretGenerator"][0]["literals"] == ["HF_TOKEN=hf_secret"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH")
def test_what_kubernetes_is_given_is_valid_and_whole(fakes):
    settings = {name: value for name, value in SETTINGS.items() if name != "JAX_PACKAGE"}
    image = "registry/name@sha256:0123"
    given = {**SETTINGS, "HF_TOKEN": "hf_secret", "IMAGE": image}
    done = launch(fakes, "--engine", "kubernetes", "--num_workers", "7", "--dry_run", **given)
    assert done.returncode == 0, done.stderr
    documents = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    for document in documents.values():
        kubernetes_validate.validate(document, "1.36", strict=True)
    assert settings.items() <= documents["ConfigMap"]["data"].items()
    assert not {"HF_TOKEN", "JAX_PACKAGE"} & documents["ConfigMap"]["data"].keys()
    assert base64.b64decode(documents["Secret"]["data"]["HF_TOKEN"]) == b"..."
    spec = documents["Job"]["spec"]
    assert spec["completions"] == spec["parallelism"] == spec["maxFailedIndexes"] == 7
    pod = spec["template"]["spec"]
    (worker,) = pod["containers"]
    assert worker["image"] == image
    secret = worker["envFrom"][1]["secretRef"]
    assert secret["name"] == documents["Secret"]["metadata"]["name"] and secret["optional"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "streams"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert "only-dir=streams" in volume["csi"]["volumeAttributes"]["mountOptions"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH")
@pytest.mark.parametrize("name", few(["tpu7x-8", "v4-8", "v5litepod-1"]))  # each of its own family of nodes
def test_pods_land_on_the_tpu_that_was_asked_for(fakes, name):
    flags = ("--engine", "kubernetes", "--accelerator_type", name, "--dry_run")
    done = launch(fakes, *flags, IMAGE="image")
    assert done.returncode == 0, done.stderr
    (job,) = (each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "Job")
    kubernetes_validate.validate(job, "1.36", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == node_selector(name) | {"cloud.google.com/gke-spot": "true"}
    (worker,) = pod["containers"]
    asked, limits = worker["resources"]["requests"], worker["resources"]["limits"]
    assert asked["google.com/tpu"] == limits["google.com/tpu"] == str(TPUS[name].chips)
    assert "cpu" in asked and worker["env"]


@pytest.mark.wide
def test_pods_cannot_land_on_an_unknown_tpu(fakes):
    done = launch(fakes, "--engine", "kubernetes", "--accelerator_type", "v3-8", "--dry_run", IMAGE="image")
    assert done.returncode == 2 and "no TPU machine 'v3-8'" in done.stderr


def test_kubernetes_needs_an_image(fakes):
    fakes.add("kubectl", "")
    done = launch(fakes, "--engine", "kubernetes")
    assert done.returncode == 2 and "IMAGE" in done.stderr and fakes.calls() == []


@pytest.mark.wide
@pytest.mark.parametrize(
    "engine, tool, bucket",
    [
        ("gcloud", "gcloud", "gs://bucket/folder"),
        ("kubernetes", "kubectl", "file:///bucket"),
        ("skypilot", "sky", "gs://"),
    ],
)
def test_these_engines_need_a_bucket_and_nothing_else(fakes, engine, tool, bucket):
    fakes.add(tool, "")
    done = launch(fakes, "--engine", engine, bucket=bucket, IMAGE="image")
    assert done.returncode == 2 and "must be the name of a Cloud Storage bucket" in done.stderr
    assert fakes.calls() == []


@pytest.mark.parametrize(
    "engine, tool", few([("kubernetes", "kubectl"), ("skypilot", "sky"), ("slurm", "sbatch")])
)
def test_what_the_tool_says_is_passed_on(fakes, engine, tool):
    fakes.add(tool, "echo 'it broke' >&2; exit 3")
    done = launch(fakes, "--engine", engine, IMAGE="image")
    assert done.returncode == 75 and "it broke" in done.stderr


def test_sbatch_gets_one_array(fakes):
    """What it makes of it is in test_slurm.py."""
    fakes.add("sbatch", "echo Submitted batch job 7")
    flags = (
        "--engine",
        "slurm",
        "--workers",
        "3,7-8",
        "--parallel",
        "2",
        "--sbatch_flags=--gpus=1 --comment='a b'",
    )
    shown = launch(fakes, *flags, "--dry_run")
    assert fakes.calls() == []
    done = launch(fakes, *flags, HF_TOKEN="hf_secret")
    assert done.returncode == 0 and done.stdout.startswith("Submitted batch job 7\n3 workers handed to Slurm")
    (call,) = fakes.calls("sbatch")
    own = ["--array=3,7,8%2", "--export=ALL,UPLOAD_TO_GCS=true", "--gpus=1", "--comment=a b"]
    assert call.arguments == [*own, "deploy/slurm/worker.sbatch"] == shlex.split(shown.stdout)[1:]
    assert call.environment["PWD"] == str(ROOT) and call.environment["HF_TOKEN"] == "hf_secret"


def test_slurm_needs_no_bucket(fakes):
    shown = launch(fakes, "--engine", "slurm", "--num_workers", "64", "--dry_run", bucket="")
    assert shown.stdout == "sbatch --array=0-63 --export=ALL deploy/slurm/worker.sbatch\n"


def local(fakes: Fakes, *flags: str, script: str) -> subprocess.Popen:
    """The local engine in a checkout whose launch_worker.sh is `script`."""
    checkout = fakes.folder.parent / "checkout"
    shutil.copytree(ROOT / "qwen_jax", checkout / "qwen_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch_all_workers.sh", checkout)
    write_script(checkout / "launch_worker.sh", script)
    return subprocess.Popen(
        [checkout / "launch_all_workers.sh", "--engine", "local", *flags],
        env=fakes.environment(CUDA_VISIBLE_DEVICES=""),
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_local_workers_run_to_their_end_and_say_how(fakes):
    script = '[ "$WORKER_ID" != 4 ] || exit 65; echo "I am $WORKER_ID"'
    running = local(fakes, "--workers", "3-5", "--parallel", "2", script=script)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert out.splitlines()[-1] == "2 of 3 workers completed"
    assert "worker 4: exit 65" in out and "not completed: 4; see logs/worker_N.log" in err
    assert (fakes.folder.parent / "checkout" / "logs" / "worker_5.log").read_text() == "I am 5\n"


@pytest.mark.wide
def test_supervised_local_workers_are_started_again(fakes):
    script = '[ -e "again$WORKER_ID" ] || { touch "again$WORKER_ID"; kill -9 $$; }'
    flags = ("--num_workers", "2", "--supervise", "--backoff_s", "0.01")
    running = local(fakes, *flags, script=f'cd "$(dirname "$0")"; {script}')
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and out.count("killed by signal 9") == 2


@pytest.mark.wide
def test_sigterm_ends_the_local_workers_gently(fakes):
    script = 'cd "$(dirname "$0")"; trap "touch ended$WORKER_ID; exit 143" TERM; touch up$WORKER_ID; sleep 60 & wait $!'
    running = local(fakes, "--num_workers", "2", "--parallel", "2", "--supervise", script=script)
    checkout = fakes.folder.parent / "checkout"
    until(lambda: len(list(checkout.glob("up*"))) == 2)
    os.kill(running.pid, signal.SIGTERM)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 143 and "run this again to go on" in err
    assert len(list(checkout.glob("ended*"))) == 2


@pytest.mark.wide
def test_the_local_dry_run_can_be_run_by_hand(fakes):
    running = local(fakes, "--num_workers", "3", "--dry_run", script='echo "$WORKER_ID" >>ran')
    out, _ = running.communicate(timeout=60)
    checkout = fakes.folder.parent / "checkout"
    for line in out.splitlines():
        subprocess.run(shlex.split(line), cwd=checkout, check=True)
    assert (checkout / "ran").read_text().split() == ["0", "1", "2"]
