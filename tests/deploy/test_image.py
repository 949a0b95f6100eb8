"""deploy/Dockerfile: linted, and true to the checkout. No image is built here."""

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.scripts.conftest import ROOT

DEPLOY = ROOT / "deploy"
TEXT = re.sub(r"\\\n", "", (DEPLOY / "Dockerfile").read_text())
INSTRUCTIONS = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and line[0] not in "# "]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_base_and_packages_are_pinned():
    (base,) = arguments("FROM")
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
    lines = [
        line for line in (DEPLOY / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    ]
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            wanted = Requirement(line)
            assert wanted.specifier.contains(pins[wanted.name.lower().replace("_", "-")]), line


def test_everything_that_is_copied_is_there_and_is_sent_to_the_builder():
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    sent = [rule[1:] for rule in rules if rule.startswith("!")]
    assert rules[0] == "*"
    for copied in arguments("COPY"):
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(fnmatch.fnmatch(source, rule) for rule in sent), source


def test_the_worker_is_what_it_runs_as_a_user_of_its_own():
    assert arguments("ENTRYPOINT") == ['["/app/launch_worker.sh"]']
    (user,) = arguments("USER")
    assert int(user) > 0
    assert INSTRUCTIONS[-2][0] == "USER"


@pytest.mark.parametrize("variable", ["VENV_DIR", "JAX_PACKAGE"])
def test_the_environment_that_was_installed_is_the_one_that_is_used(variable):
    (env,) = arguments("ENV")
    assert f"{variable}=" in env
    names = [name for name, _ in INSTRUCTIONS]
    assert "./launch_worker.sh --setup" in arguments("RUN")
    assert names.index("ENV") < names.index("RUN")
