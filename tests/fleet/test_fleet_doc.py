"""docs/fleet.md shows commands with their real output: each is run, the monitor in the middle of a fleet's work."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_jax.accelerators import TPUS, CloudTpu
from tests.fleet import fleets
from tests.reading.test_reading_doc import shape
from tests.scripts.conftest import ROOT

PAGE = (ROOT / "docs" / "fleet.md").read_text()
SHOWN = re.findall(r"^```\n\$ (.*)\n((?:.*\n)*?)```$", PAGE, re.M)
OTHER_ENGINES = ("kubernetes", "skypilot", "slurm", "local")


def checkout(folder: Path) -> Path:
    """The checkout's files, with an environment."""
    for path in ROOT.iterdir():
        if path.name not in ("activations", "checkpoints", "data") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """Before anything has run."""
    return checkout(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def busy(tmp_path_factory) -> Path:
    """With the files of a made-up fleet."""
    folder = checkout(tmp_path_factory.mktemp("busy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleets, "NOW", time.time())
        fleets.make_fleet(folder)
    return folder


def test_every_engine_and_the_monitor_are_shown():
    commands = " ".join(command for command, _ in SHOWN)
    for word in ("plan", "doctor", "--supervise", "instance", "check_all_workers.sh", *OTHER_ENGINES):
        assert word in commands


def row(name: str, machine: CloudTpu) -> str:
    """Of the table of TPUs."""
    version = f"`{machine.runtime_version}`" if machine.runtime_version else "no"
    instance = f"`{machine.machine_type}`, `{machine.image_family}`" if machine.image_family else "no"
    labels = f"`{machine.gke_type}`, `{machine.gke_topology}`"
    return f"| `{name}` | {machine.chips} | {version} | {instance} | {labels} |"


def test_the_table_of_tpus_is_what_the_code_says():
    """A new row is the line that this test wants."""
    wanted = [row(name, machine) for name, machine in TPUS.items()]
    assert [line for line in wanted if line not in PAGE] == []


# Runtime versions, image families, machine types and GKE's types, as Google Cloud writes them.
NAMES_OF_TPUS = re.compile(
    r"(?:v2-alpha-tpu|tpu-ubuntu|ubuntu-accel-|ct\d[a-z]+-|tpu7x-standard-|tpu-v\d[\w-]*(?:podslice|slice))[\w-]*"
)


def test_every_name_that_docs_and_manifests_show_is_in_the_table():
    known = {str(value) for machine in TPUS.values() for value in vars(machine).values()}
    files = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "deploy").rglob("*.yaml")]
    shown = {name for file in files for name in NAMES_OF_TPUS.findall(file.read_text())}
    assert len(shown) > 5 and shown - known == set()


def test_every_command_that_makes_a_tpu_is_one_that_the_launcher_prints():
    outputs = "".join(output for _, output in SHOWN)
    made = re.findall(r"^gcloud compute (?:tpus|instances).* create .*$", PAGE, re.M)
    assert made and all(line in outputs for line in made)


@pytest.mark.parametrize(
    "command, output",
    [
        pytest.param(
            *shown,
            id=shown[0][-40:],
            marks=(pytest.mark.wide,) if {"plan", "doctor"} & set(shown[0].split()) else (),
        )
        for shown in SHOWN
    ],
)
def test_a_command_prints_what_is_shown(bare, busy, fakes, command, output):
    if "kubernetes" in command and shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH")
    environment = fakes.environment(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    place = busy if "check_all" in command else bare
    command = command.replace("python -m", f"{sys.executable} -m")
    done = subprocess.run(["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True)
    printed = re.sub(r"write in \S+qwen_jax/xla", "write in ~/.cache/qwen_jax/xla", done.stdout)
    assert [shape(line) for line in printed.splitlines()] == [shape(line) for line in output.splitlines()], (
        done.stderr
    )
