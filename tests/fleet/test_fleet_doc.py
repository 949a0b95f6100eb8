"""docs/fleet.md shows commands with their real output: each is run, the monitor in the middle of a fleet's work."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fleet import fleets
from tests.reading.test_reading_doc import shape
from tests.scripts.conftest import ROOT

SHOWN = re.findall(r"^```\n\$ (.*)\n((?:.*\n)*?)```$", (ROOT / "docs" / "fleet.md").read_text(), re.M)


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
    for word in ("plan", "doctor", "--supervise", "kubernetes", "skypilot", "local", "check_all_workers.sh"):
        assert word in commands


@pytest.mark.parametrize("command, output", SHOWN, ids=[command[-40:] for command, _ in SHOWN])
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
