"""Fakes that stand first on PATH and write down how they were called."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen_jax.cli import FlagParser
from qwen_jax.settings import WORKER_ID_VARIABLES, add_settings

ROOT = Path(__file__).parents[2]
# Each call gets a folder of its own with the arguments and the environment, separated by zero bytes.
RECORD = """
call={calls}/"$(date +%s%N).$$-$(basename "$0")"
mkdir "$call"
for argument in "$@"; do printf '%s\\0' "$argument"; done >"$call/arguments"
[ -t 0 ] || cat >"$call/input"
env -0 >"$call/environment.tmp"
mv "$call/environment.tmp" "$call/environment"
"""


@dataclass(frozen=True)
class Call:
    """One recorded call of a fake program."""

    program: str
    arguments: list[str]
    environment: dict[str, str]
    input: bytes


@dataclass(frozen=True)
class Fakes:
    """A folder of fake programs, and what was called."""

    folder: Path
    calls_folder: Path

    def add(self, name: str, body: str, *, record: bool = True) -> Path:
        """Puts a bash script `name` in front of PATH; with `record` it writes down each call first."""
        path = self.folder / name
        return self.recorded(path, body) if record else write_script(path, body)

    def recorded(self, path: Path, body: str = "") -> Path:
        """A bash script anywhere that writes down each call first."""
        recording = RECORD.replace("{calls}", shlex.quote(str(self.calls_folder)))
        return write_script(path, recording + body)

    def calls(self, program: str = "") -> list[Call]:
        """The recorded calls in order, of one program or of all."""
        found = [
            Call(
                folder.name.partition("-")[2],
                _split(folder / "arguments"),
                _variables(folder),
                (folder / "input").read_bytes() if (folder / "input").exists() else b"",
            )
            for folder in sorted(self.calls_folder.iterdir())
            if (folder / "environment").exists()
        ]
        return [call for call in found if program in ("", call.program)]

    def environment(self, **variables: str) -> dict[str, str]:
        """An environment without any setting of ours, with the fakes first on PATH."""
        ours = {*setting_variables(), *launch_worker_variables(), *WORKER_ID_VARIABLES}
        ours |= {"NUM_WORKERS", "ZONE", "NAME_PATTERN", "REMOTE_DIR", "CODE_URL", "STREAMS_URL"}
        ours |= {"ACCELERATOR_TYPE", "RUNTIME_VERSION", "IMAGE"}
        ours |= {"GCLOUD_CREATE_FLAGS", "GCLOUD_SSH_FLAGS", "SBATCH_FLAGS", "HF_TOKEN"}
        kept = {name: value for name, value in os.environ.items() if name not in ours}
        path = f"{self.folder}:{os.environ['PATH']}"
        return kept | {"PATH": path, "CALLS": str(self.calls_folder)} | variables


def setting_variables() -> list[str]:
    """Every environment variable that a flag of the worker reads."""
    parser = FlagParser(env_for_all=True)
    add_settings(parser)
    parser.switch("verbose", "")
    return [variable for _, variable in parser._env_flags]


def launch_worker_variables() -> set[str]:
    """Every environment variable that launch_worker.sh reads for itself."""
    return set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "launch_worker.sh").read_text()))


def write_script(path: Path, body: str) -> Path:
    """Writes an executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}")
    path.chmod(0o755)
    return path


def _split(file: Path) -> list[str]:
    return file.read_text().split("\0")[:-1]


def _variables(call: Path) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in _split(call / "environment"))


@pytest.fixture
def fakes(tmp_path) -> Fakes:
    made = Fakes(tmp_path / "fake bin", tmp_path / "calls")
    made.folder.mkdir()
    made.calls_folder.mkdir()
    return made
