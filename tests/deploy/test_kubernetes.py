"""The manifests are valid for recent versions of Kubernetes and say what docs and exit codes promise."""

import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from qwen_jax.errors import BadDataError, ConfigError, TerminatedError, UsageError
from qwen_jax.fleet.kubernetes import node_selector

DEPLOY = Path(__file__).parents[2] / "deploy" / "kubernetes"
MANIFESTS = [path for path in sorted(DEPLOY.rglob("*.yaml")) if path.name != "kustomization.yaml"]
VERSIONS = ("1.34", "1.36")


def documents(text: str) -> list[dict]:
    return [document for document in yaml.safe_load_all(text) if document]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid(path, version):
    found = documents(path.read_text())
    assert found
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on the PATH")
@pytest.mark.parametrize("version", VERSIONS)
def test_the_base_renders_and_is_valid(version):
    rendered = subprocess.run(
        ["kubectl", "kustomize", DEPLOY / "base"], capture_output=True, text=True, check=True
    ).stdout
    kinds = {}
    for document in documents(rendered):
        kubernetes_validate.validate(document, version, strict=True)
        kinds[document["kind"]] = document
    assert set(kinds) == {"ConfigMap", "Job", "ServiceAccount"}
    (worker,) = kinds["Job"]["spec"]["template"]["spec"]["containers"]
    assert worker["envFrom"][0]["configMapRef"]["name"] == kinds["ConfigMap"]["metadata"]["name"]


def job() -> dict:
    return yaml.safe_load((DEPLOY / "base" / "job.yaml").read_text())["spec"]


def test_an_index_is_a_worker_that_is_replaced_until_it_is_done():
    spec, pod = job(), job()["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert spec["podReplacementPolicy"] == "Failed" and pod["restartPolicy"] == "Never"
    assert spec["backoffLimitPerIndex"] > 0 and "subdomain" not in pod
    # SIGTERM takes the worker up to 10 s (docs/reliability.md); GKE gives spot pods 15.
    assert 10 < pod["terminationGracePeriodSeconds"] <= 15


def one_worker() -> dict:
    return yaml.safe_load((DEPLOY / "one-worker.yaml").read_text())["spec"]


@pytest.mark.parametrize("spec", [job(), one_worker()], ids=["base", "one-worker"])
def test_a_pod_lands_on_a_spot_tpu_with_room_for_it(spec):
    """As docs/fleet.md says: one-chip v5e hosts."""
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true", **node_selector("v5litepod-1")}
    spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    assert pod["tolerations"] == [spot]
    (worker,) = pod["containers"]
    assert worker["command"] == ["/app/launch_worker.sh"]
    asked = worker["resources"]["requests"]
    assert set(asked) == {"google.com/tpu", "cpu", "memory", "ephemeral-storage"}
    assert asked["google.com/tpu"] == worker["resources"]["limits"]["google.com/tpu"] == "1"


@pytest.mark.parametrize("spec", [job(), one_worker()], ids=["base", "one-worker"])
def test_a_pod_is_the_account_that_may_write_to_the_bucket(spec):
    account = yaml.safe_load((DEPLOY / "base" / "service-account.yaml").read_text())
    pod = spec["template"]["spec"]
    assert pod["serviceAccountName"] == account["metadata"]["name"] == "extraction"
    assert "subject/ns/default/sa/extraction" in (DEPLOY.parents[1] / "docs" / "fleet.md").read_text()


def test_one_worker_is_replaced_as_an_index_is():
    spec, pod = one_worker(), one_worker()["template"]["spec"]
    assert spec["podReplacementPolicy"] == "Failed" and pod["restartPolicy"] == "Never"
    assert spec["backoffLimit"] > 0 and 10 < pod["terminationGracePeriodSeconds"] <= 15
    (fails, *ignored), (base_fails, *base_ignored) = (
        each["podFailurePolicy"]["rules"] for each in (spec, job())
    )
    assert fails == base_fails | {"action": "FailJob"} and ignored == base_ignored


def test_one_worker_uploads_what_its_disk_may_lose():
    (worker,) = one_worker()["template"]["spec"]["containers"]
    values = {each["name"]: each["value"] for each in worker["env"]}
    assert values["WORKER_ID"] == "5" and values["UPLOAD_TO_GCS"] == "true"
    (mount,) = worker["volumeMounts"]
    assert values["DATASET_DIR"] == mount["mountPath"] and mount["readOnly"]


@pytest.mark.parametrize("spec", [job(), one_worker()], ids=["base", "one-worker"])
def test_a_pod_runs_as_the_user_of_the_image(spec):
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text()
    user = int(re.findall(r"^USER (\d+)$", dockerfile, re.M)[-1])
    assert f"groupadd --gid {user} " in dockerfile and f"useradd --uid {user} --gid {user} " in dockerfile
    pod = spec["template"]["spec"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        **dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), user),
    }
    (worker,) = pod["containers"]
    assert worker["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for volume in pod["volumes"]:
        if "csi" in volume:
            options = volume["csi"]["volumeAttributes"]["mountOptions"].split(",")
            assert {f"uid={user}", f"gid={user}"} <= set(options)


@pytest.mark.parametrize("spec", [job(), one_worker()], ids=["base", "one-worker"])
def test_streams_lie_in_the_bucket_and_compiled_programs_do_not(spec):
    pod = spec["template"]["spec"]
    (streams,) = (volume for volume in pod["volumes"] if "csi" in volume)
    assert streams["name"] == "streams" and streams["csi"]["readOnly"]
    assert "only-dir=streams" in streams["csi"]["volumeAttributes"]["mountOptions"].split(",")
    (worker,) = pod["containers"]
    assert "COMPILATION_CACHE_DIR" not in {each["name"] for each in worker["env"]}


def test_exit_codes_that_starting_again_does_not_help_fail_the_index():
    fails, *ignored = job()["podFailurePolicy"]["rules"]
    final = [UsageError.exit_code, BadDataError.exit_code, ConfigError.exit_code]
    assert (fails["action"], fails["onExitCodes"]["values"]) == ("FailIndex", final)
    assert {rule["action"] for rule in ignored} == {"Ignore"}
    assert ignored[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert ignored[1]["onExitCodes"]["values"] == [TerminatedError.exit_code]


def test_settings_are_variables_that_the_worker_reads():
    from tests.scripts.conftest import setting_variables

    lines = (DEPLOY / "base" / "settings.env").read_text().splitlines()
    (worker,) = job()["template"]["spec"]["containers"]
    names = {line.split("=")[0] for line in lines} | {each["name"] for each in worker["env"]}
    assert names <= set(setting_variables())
