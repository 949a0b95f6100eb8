"""deploy/Dockerfile: linted, and true to the checkout; a slow test builds the image."""

import fnmatch
import os
import re
import shlex
import shutil
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
    assert arguments("FROM") == ["${BASE}"]
    base = arguments("ARG")[0].removeprefix("BASE=")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base), "the hashes are of files for Python 3.11"
    pins = {}
    for line in (DEPLOY / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = re.fullmatch(r"(\S+)==(\S+)  # sha256:[0-9a-f]{64}", line).groups()
            pins[name.lower().replace("_", "-")] = version
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            wanted = Requirement(line)
            assert wanted.specifier.contains(pins[wanted.name.lower().replace("_", "-")]), line


@pytest.mark.parametrize(("package", "libtpu"), [("jax[tpu]", 1), ("jax[cuda13]", 0)])
def test_what_is_pinned_is_installed_by_its_hash(package, libtpu, tmp_path):
    (prepared,) = (command for command in arguments("RUN") if "--require-hashes" in command)
    command = prepared.partition("&& python3 -m venv")[0].replace("/tmp", str(tmp_path))
    subprocess.run(["sh", "-ec", command], cwd=ROOT, env={**os.environ, "JAX_PACKAGE": package}, check=True)
    lines = [line for line in (tmp_path / "hashed.txt").read_text().splitlines() if line[0] != "#"]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert len(lines) > 70 and sum(line.startswith("libtpu==") for line in lines) == libtpu


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
    assert any(command.endswith("./launch_worker.sh --setup") for command in arguments("RUN"))
    assert names.index("ENV") < names.index("RUN")


def buildah(*arguments: str) -> str:
    """What it prints; it must succeed. It reads its own variables, such as STORAGE_DRIVER and BUILDAH_ISOLATION."""
    done = subprocess.run(["buildah", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("buildah") is None, reason="buildah is not on the PATH")
def test_it_is_built_without_a_daemon_and_its_user_runs_the_demo(tmp_path):
    """For a CPU. BUILDAH_FLAGS: further flags of the build, for another base or for the place of packages."""
    image = tmp_path / "image"
    flags = ["--build-arg=JAX_PACKAGE=jax", *shlex.split(os.environ.get("BUILDAH_FLAGS", ""))]
    buildah("build", *flags, f"--iidfile={image}", "--file=deploy/Dockerfile", ".")
    container = buildah("from", image.read_text()).strip()
    try:
        shown = buildah("run", "--env=JAX_PLATFORMS=cpu", container, "--", "/app/launch_worker.sh", "--demo")
    finally:
        buildah("rm", container)
    assert "\n96 samples, " in shown
