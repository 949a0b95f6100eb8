"""What pyproject.toml says agrees with the files that say it too."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qwen_jax import __version__
from qwen_jax.run.doctor import PACKAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements(path: Path) -> set[str]:
    return {line for line in path.read_text().splitlines() if line and not line.startswith("#")}


def test_requirements_are_the_core_and_what_a_worker_takes():
    wanted = {*PROJECT["dependencies"], *EXTRAS["worker"], *EXTRAS["gcs"]}
    assert requirements(ROOT / "requirements.txt") == wanted


def test_the_doctor_looks_for_all_of_them():
    """And so for jinja2, which transformers needs for chat templates and does not require."""
    names = {Requirement(line).name for line in requirements(ROOT / "requirements.txt")}
    assert {name.replace("-", "_") for name in names} == {name.replace(".", "_") for name in PACKAGES}
    assert "jinja2" in names


def test_dev_is_what_the_tests_install():
    ours = f"{PROJECT['name']}[worker,gcs]"
    assert {ours, *requirements(ROOT / "tests" / "requirements.txt")} == set(EXTRAS["dev"])


def test_the_core_is_light():
    names = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert names == {"numpy", "isal", "ml_dtypes"}


@pytest.mark.parametrize(
    "file, pattern", [("CITATION.cff", r"^version: (.+)$"), ("CHANGELOG.md", r"^## (.+)$")]
)
def test_the_version_is_that_of_the_package(file, pattern):
    assert re.search(pattern, (ROOT / file).read_text(), re.M)[1] == __version__
    assert PROJECT["dynamic"] == ["version"]


def test_contributing_is_ten_lines():
    lines = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line]
    assert len(lines) == 11 and lines[0].startswith("# ")
