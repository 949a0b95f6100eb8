"""docs/reading.md does what it says: its commands run, and print what it shows."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from examples.demo.show import answers_by_kind
from qwen_jax.__main__ import main
from tests.reading.conftest import ROOT
from tests.run_worker.starts import Start

PAGE = (ROOT / "docs" / "reading.md").read_text()
SHOWN = re.findall(r"^\$ python -m qwen_jax (.+)\n((?:(?!```|\$).*\n)+)", PAGE, re.MULTILINE)
FIVE = re.search(r"```bash\n(.+?)```", PAGE, re.DOTALL).group(1).splitlines()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which the demo has run."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "examples").symlink_to(ROOT / "examples")
    settings = re.search(
        r"run_demo\(\) \{(.+?)\n\}", (ROOT / "launch_worker.sh").read_text(), re.DOTALL
    ).group(1)
    (folder / "demo_output" / "bucket").mkdir(parents=True)
    words = shlex.split(settings.replace("$PWD", str(folder)).replace("$out", "demo_output"))
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    here = os.getcwd()
    os.chdir(folder)
    command = [sys.executable, "extract_activations.py", "--worker_id", "0"]
    paths = {name: str(folder / variables[name]) for name in ("OUTPUT_DIR", "CHECKPOINT_DIR")}
    inputs = {name: str(folder / variables[name]) for name in ("MODEL_PATH", "DATASET_DIR")}
    environment = os.environ | variables | paths | inputs | {"JAX_PLATFORMS": "cpu"}
    assert Start(command, environment, folder / "log").wait() == 0, (folder / "log").read_text()
    yield folder
    os.chdir(here)


def shape(line: str) -> str:
    """A line without its numbers and what differs by place: other machines may round otherwise."""
    line = re.sub(r"(/\S+)?(examples/demo|demo_output)", r"\2", line)
    return re.sub(r"-?\d[\d.,]*(e[-+]\d+)?", "#", re.sub(r" +", " ", line)).strip()


def test_all_commands_are_shown():
    from qwen_jax.commands import COMMANDS

    shown_in_fleet_md = {"launch", "workers", "doctor"}
    assert {command.split()[0] for command, _ in SHOWN} == set(COMMANDS) - {"plot"} - shown_in_fleet_md


@pytest.mark.parametrize("command, output", SHOWN, ids=[command[:40] for command, _ in SHOWN])
def test_a_command_prints_what_is_shown(demo, capsys, command, output):
    if "--repair" in command:
        (demo / "demo_output/activations/worker_0/shard_0002.pkl.gz").unlink()
    main(shlex.split(command))
    printed = [shape(line) for line in capsys.readouterr().out.splitlines()]
    for line in output.splitlines():  # lines may be left out of what is shown, but not moved
        assert shape(line) in printed, line
        del printed[: printed.index(shape(line)) + 1]


@pytest.mark.parametrize("kind", ("copy", "shift"))
def test_the_demos_model_solves_held_out_tasks_of_these_kinds(demo, kind):
    count, solved, log_probability = answers_by_kind(demo / "demo_output/bucket/activations/tpu_0")[kind]
    assert count == 16 and solved >= 13 and log_probability > -0.2


def test_the_five_commands(demo, capsys):
    """Four of them here; the last one needs SAE_PYTHON."""
    assert len(FIVE) == 5
    for line in FIVE[:4]:
        assert main(shlex.split(line)[3:]) == 0
    assert (demo / "activations.png").exists() and (demo / "stats.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif("SAE_PYTHON" not in os.environ, reason="SAE_PYTHON names no python with sae-lens")
def test_the_fifth_command_trains_an_sae(demo):
    done = subprocess.run(
        [os.environ["SAE_PYTHON"], *shlex.split(FIVE[4])[1:]], cwd=demo, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"before, ([\d.]+) after", done.stdout).group(1)) < 0.5
    shutil.rmtree(demo / "sae")


BLOCKS = [code for code in re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL) if "demo_output" in code]


def test_there_are_three_short_ways_and_one_with_everything():
    assert len(BLOCKS) == 4 and all(len(block.splitlines()) < 10 for block in BLOCKS[:3])
    assert PAGE.index("```python") < PAGE.index("```bash")


@pytest.mark.parametrize("block", BLOCKS, ids=["torch", "jax", "numpy", "everything"])
def test_the_python_of_the_page_runs(demo, block):
    scope: dict = {}
    exec(block, scope)
    if "x" in scope:
        assert scope["x"].ndim == 2 and scope["x"].shape[1] == 64
    if "loss" in scope:
        mean_square = float(np.square(np.asarray(scope["x"])).mean())
        assert 1 < mean_square == pytest.approx(float(scope["loss"]), rel=1e-5)
    if "batches" in scope:
        assert scope["batches"].cursor["batches"] == 1 and scope["rows"].shape == (2400, 64)
