"""The package as pip installs it, in an environment with nothing but its core: shards are read there."""

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from qwen_jax import __version__
from tests.reading.conftest import ROOT, all_rows

PROGRAM = """
import importlib.util, sys
import numpy as np
import qwen_jax
from qwen_jax.reading import iter_activations, iter_samples

assert importlib.util.find_spec("jax") is None and importlib.util.find_spec("google") is None
assert qwen_jax.__file__.startswith(sys.prefix), qwen_jax.__file__
np.save(sys.argv[2], np.concatenate(list(iter_activations(sys.argv[1], 3, 1000))))
assert len(list(iter_samples(sys.argv[1], layers=[1]))) == 36
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """Made without a network: a wheel of the checkout, and the core's packages as they are here."""
    root = tmp_path_factory.mktemp("installed")
    source, venv = root / "source", root / "venv"
    shutil.copytree(ROOT / "qwen_jax", source / "qwen_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source)
    (wheel,) = root.glob("qwen_jax-*.whl")
    run(*pip, "--python", venv / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = venv.glob("lib/python*/site-packages")
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in (Requirement(line).name for line in dependencies):
        link(name, packages)
    return venv


def link(name: str, packages: Path) -> None:
    """What an installed distribution consists of."""
    found = distribution(name)
    for top in {file.parts[0] for file in found.files if file.parts[0] != ".."}:
        (packages / top).symlink_to(found.locate_file(top))


def run(*command, **kwargs) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_(environment: Path, tmp_path: Path, *command) -> str:
    """Runs a program of the environment where no checkout is to be seen."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return run(environment / "bin" / command[0], *command[1:], cwd=tmp_path, env=bare)


def test_shards_are_read_with_the_core_alone(environment, clean, tmp_path):
    in_(environment, tmp_path, "python", "-c", PROGRAM, clean, tmp_path / "rows.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), all_rows(clean, 3))


def test_the_console_script_is_the_module(environment, tmp_path):
    shown = in_(environment, tmp_path, "qwen-jax", "--help")
    assert shown == in_(environment, tmp_path, "python", "-m", "qwen_jax", "--help") and "certify" in shown


def test_a_command_without_its_packages_says_what_to_install(environment, clean, tmp_path):
    done = subprocess.run(
        [environment / "bin" / "qwen-jax", "verify", clean], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 78 and "pip install 'qwen-jax[worker,gcs]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_are_launched_from_a_checkout(environment, tmp_path):
    done = subprocess.run(
        [environment / "bin" / "qwen-jax", "launch", "--engine", "local"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "from a checkout" in done.stderr


def test_it_is_typed_and_nothing_else_of_the_checkout_is_installed(environment):
    (packages,) = environment.glob("lib/python*/site-packages")
    assert (packages / "qwen_jax" / "py.typed").exists()
    assert (packages / f"qwen_jax-{__version__}.dist-info").is_dir()
    names = {path.name for path in packages.iterdir()}
    assert not names & {"tests", "benchmarks", "deploy", "examples", "docs"}
