"""deploy/skypilot/worker.yaml, read by SkyPilot itself, which lives in an environment of its own."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from qwen_jax.accelerators import TPUS
from qwen_jax.errors import StorageError
from qwen_jax.settings import WORKER_ID_VARIABLES
from tests.scripts.conftest import ROOT, launch_worker_variables, setting_variables

pytestmark = pytest.mark.wide  # SkyPilot takes seconds to import
TASK = ROOT / "deploy" / "skypilot" / "worker.yaml"
# What SkyPilot makes of the task, with the variables that a user passes on.
PARSE = """
import json, sys, yaml, sky
task = sky.Task.from_yaml_config(yaml.safe_load(open(sys.argv[1])), env_overrides=[("GCS_BUCKET", "my-bucket")])
(resources,) = task.resources
mounts = {path: [storage.source, storage.mode.value] for path, storage in task.storage_mounts.items()}
found = {"resources": resources.to_yaml_config(), "envs": dict(task.envs), "run": task.run, "mounts": mounts}
print(json.dumps(found | {"workdir": task.workdir}))
"""


def parsed(task: Path, home: Path) -> dict:
    python = os.environ.get("SKY_PYTHON")
    if python is None:
        pytest.skip("SKY_PYTHON names no Python that has SkyPilot; tests/run makes one")
    environment = os.environ | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    environment.pop("GCS_BUCKET", None)
    command = [python, "-c", PARSE, task]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> dict:
    return parsed(TASK, tmp_path_factory.mktemp("home"))


def test_a_region_can_be_pinned_as_the_docs_say(tmp_path):
    lines = re.findall(r"^  infra: .*$", (ROOT / "docs" / "fleet.md").read_text(), re.M)
    pinned = tmp_path / "worker.yaml"
    pinned.write_text(re.sub(r"^  infra: .*$", lines[0], TASK.read_text(), flags=re.M))
    assert parsed(pinned, tmp_path)["resources"]["infra"] == "gcp/us-west4"


def test_a_spot_job_that_is_recovered(task):
    resources = task["resources"]
    assert resources["use_spot"] and resources["infra"] == "gcp"
    assert resources["job_recovery"]["recover_on_exit_codes"] == [StorageError.exit_code]
    assert resources["job_recovery"]["strategy"] == "EAGER_NEXT_REGION"


def test_its_machine_is_one_of_the_table(task):
    (asked,) = task["resources"]["accelerators"]
    name = asked.removeprefix("tpu-")
    version = task["resources"]["accelerator_args"]["runtime_version"]
    assert version == TPUS[name].runtime_version


def test_it_runs_the_worker_with_variables_that_it_reads(task):
    assert task["run"].strip() == "exec ./launch_worker.sh" and task["workdir"] == "."
    read = {*setting_variables(), *launch_worker_variables()}
    assert {name for name in task["envs"] if not name.startswith("SKYPILOT_")} <= read
    assert "SKYPILOT_JOB_RANK" in WORKER_ID_VARIABLES


def test_streams_are_in_the_bucket_and_compiled_programs_are_not(task):
    assert task["mounts"] == {"/streams": ["gs://my-bucket/streams", "MOUNT"]}
    assert task["envs"]["DATASET_DIR"] == "/streams" and "COMPILATION_CACHE_DIR" not in task["envs"]
