"""launch_worker.sh in a folder of its own, with fakes for Python, pip and nvidia-smi."""

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen_jax.settings import WORKER_ID_VARIABLES
from tests.scripts.conftest import ROOT, Fakes, setting_variables

PINS = "deploy/constraints.txt"
# Sourced by bash before the script: decides whether the machine has a TPU's device files.
NO_TPU = "compgen() { return 1; }"
# A Python that is new enough and can make an environment whose Python is the recording fake.
GOOD_PYTHON = """
case "$1" in
-c) exit 0 ;;
-m) mkdir -p "$3/bin" && cp "$FAKE_VENV_PYTHON" "$3/bin/python" ;;
esac
"""


@dataclass(frozen=True)
class Machine:
    """A checkout without an environment, on a machine with Python 3.11 and neither TPU nor GPU."""

    checkout: Path
    fakes: Fakes

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.checkout / "launch_worker.sh", *arguments],
            env=self.environment(**variables),
            cwd=self.checkout.parent,
            capture_output=True,
            text=True,
        )

    def environment(self, **variables: str) -> dict[str, str]:
        own = {"BASH_ENV": str(self.checkout / "machine.bash"), "FAKE_VENV_PYTHON": str(self.venv_python)}
        return self.fakes.environment(**own | variables)

    @property
    def venv_python(self) -> Path:
        """What becomes bin/python of a new environment."""
        return self.checkout / "venv-python"

    def has_device(self, pattern: str) -> None:
        (self.checkout / "machine.bash").write_text(f"compgen() {{ [ \"$2\" = '{pattern}' ]; }}")

    def worker_arguments(self) -> list[str]:
        """What the one started worker was given."""
        (call,) = [call for call in self.fakes.calls("python") if call.arguments[0] != "-m"]
        assert call.arguments[0] == "extract_activations.py"
        return call.arguments[1:]

    def installed(self) -> list[list[str]]:
        """What pip was asked to install, one list a call."""
        calls = [call.arguments for call in self.fakes.calls("python") if call.arguments[:2] == ["-m", "pip"]]
        return [arguments[arguments.index("install") + 1 :] for arguments in calls]


@pytest.fixture
def machine(tmp_path, fakes) -> Machine:
    checkout = tmp_path / "check out"
    checkout.mkdir()
    (checkout / "deploy").mkdir()
    for name in ("launch_worker.sh", "requirements.txt", "deploy/constraints.txt"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "machine.bash").write_text(NO_TPU)
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        fakes.add(name, GOOD_PYTHON if name == "python3" else "exit 1", record=False)
    fakes.add("nvidia-smi", "exit 9", record=False)
    made = Machine(checkout, fakes)
    made.fakes.recorded(made.venv_python)
    return made


@pytest.mark.parametrize("text", ["5", "0", "08", "09", "123"])
def test_the_id_as_argument(machine, text):
    assert machine.run(text).returncode == 0
    assert machine.worker_arguments() == ["--worker_id", text]


@pytest.mark.parametrize("variable", WORKER_ID_VARIABLES)
def test_the_id_from_each_variable(machine, variable):
    assert machine.run(**{variable: "08"}).returncode == 0
    assert machine.worker_arguments() == []
    (call,) = [call for call in machine.fakes.calls("python") if "-m" not in call.arguments]
    assert call.environment[variable] == "08"


def test_further_flags_are_passed_on_as_they_are(machine):
    flags = ["--verbose", "--dataset_path", "a b/$HOME;'\".jsonl", ""]
    machine.run("5", *flags)
    assert machine.worker_arguments() == ["--worker_id", "5", *flags]


def test_flags_alone(machine):
    machine.run("--worker_id", "7", "--verbose")
    assert machine.worker_arguments() == ["--worker_id", "7", "--verbose"]


def test_settings_reach_the_worker_unchanged(machine):
    value = "a folder/$HOME;'\"& x"
    machine.run("5", MODEL_PATH=value)
    assert machine.fakes.calls("python")[-1].environment["MODEL_PATH"] == value


@pytest.mark.parametrize("text", ["five", "5a", "", "5 6", "1.0"])
def test_an_id_that_is_no_number_is_refused_before_anything_is_installed(machine, text):
    done = machine.run(text)
    assert done.returncode == 2
    assert f"the worker id must be a whole number, got '{text}'" in done.stderr
    assert machine.fakes.calls() == [] and not (machine.checkout / ".venv").exists()


def test_the_exit_code_is_the_workers(machine):
    machine.fakes.recorded(machine.venv_python, '[ "$1" = -m ] || exit 76')
    assert machine.run("5").returncode == 76


def test_without_a_new_enough_python(machine):
    machine.fakes.add("python3", "exit 1", record=False)
    done = machine.run("5")
    assert done.returncode == 78
    assert "Python 3.11 or newer is needed" in done.stderr and "apt-get install" in done.stderr
    assert not (machine.checkout / ".venv").exists()


UV = """
case "$*" in
"-m uv python find --managed-python 3.12") echo "$(dirname "$0")/managed python" ;;
-m*) [ "${REFUSES:-}" != "$2" ] ;;
*) exit 1 ;;
esac
"""


def test_an_old_image_gets_a_newer_python_where_that_is_wanted(machine):
    machine.fakes.add("python3", UV)
    machine.fakes.add("managed python", GOOD_PYTHON, record=False)
    assert machine.run("5", INSTALL_PYTHON="true").returncode == 0
    modules = [call.arguments[1] for call in machine.fakes.calls("python3") if call.arguments[0] == "-m"]
    assert modules == ["pip", "uv", "uv"]
    assert machine.worker_arguments() == ["--worker_id", "5"]
    machine.run("5", INSTALL_PYTHON="true")
    assert len(machine.installed()) == 1


@pytest.mark.parametrize("module", ["pip", "uv"])
def test_a_python_that_cannot_be_installed(machine, module):
    machine.fakes.add("python3", UV)
    done = machine.run("5", INSTALL_PYTHON="true", REFUSES=module)
    assert done.returncode == 75 and "check the network" in done.stderr
    assert not (machine.checkout / ".venv" / "bin").exists()


def test_a_newer_python_beside_an_old_python3(machine):
    machine.fakes.add("python3", "exit 1", record=False)
    machine.fakes.add("python3.12", GOOD_PYTHON, record=False)
    assert machine.run("5").returncode == 0
    assert machine.worker_arguments() == ["--worker_id", "5"]


@pytest.mark.parametrize("device", ["/dev/accel*", "/dev/vfio/[0-9]*"])
def test_a_tpu_vm_gets_jax_for_tpu(machine, device):
    machine.has_device(device)
    machine.fakes.add("nvidia-smi", "exit 0", record=False)
    machine.run("5")
    assert machine.installed() == [
        ["--no-color", "--disable-pip-version-check", "jax[tpu]", "-r", "requirements.txt", "-c", PINS]
    ]


def test_uv_installs_the_same_where_it_is_there(machine):
    machine.fakes.add("uv", "")
    assert machine.run("5").returncode == 0
    (call,) = machine.fakes.calls("uv")
    assert call.arguments[:4] == ["pip", "install", "--quiet", "--python"]
    assert call.arguments[4:] == [".venv/bin/python", "jax", "-r", "requirements.txt", "-c", PINS]
    assert machine.installed() == []


def test_where_uv_cannot_pip_does(machine):
    machine.fakes.add("uv", "exit 1")
    assert machine.run("5").returncode == 0
    assert machine.installed()[0][2:] == ["jax", "-r", "requirements.txt", "-c", PINS]


def test_a_gpu_machine_gets_jax_for_cuda(machine):
    machine.fakes.add("nvidia-smi", "")
    machine.run("5")
    assert machine.fakes.calls("nvidia-smi")[0].arguments == ["-L"]
    assert machine.installed()[0][2] == "jax[cuda13]"


def test_other_machines_get_plain_jax(machine):
    """nvidia-smi is there but finds no GPU."""
    done = machine.run("5")
    assert machine.installed()[0][2] == "jax"
    assert "installing jax and requirements.txt into .venv" in done.stderr


def test_the_choice_of_jax_can_be_overruled(machine):
    machine.run("5", JAX_PACKAGE="jax[cuda12]")
    assert machine.installed()[0][2] == "jax[cuda12]"


def test_the_environment_is_made_once(machine):
    machine.run("5")
    done = machine.run("5")
    assert len(machine.installed()) == 1
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("change", ["requirements", "versions", "machine", "python"])
def test_the_environment_is_made_again_when_it_no_longer_fits(machine, change):
    machine.run("5")
    if change == "requirements":
        (machine.checkout / "requirements.txt").write_text("numpy\n")
    elif change == "versions":
        (machine.checkout / PINS).write_text("numpy==2.0\n")
    elif change == "machine":
        machine.has_device("/dev/accel*")
    else:
        (machine.checkout / ".venv" / "bin" / "python").unlink()
    assert machine.run("5").returncode == 0
    assert len(machine.installed()) == 2


def test_an_installation_that_failed_is_done_again(machine):
    machine.fakes.recorded(machine.venv_python, '[ "$1" != -m ]')
    done = machine.run("5")
    assert done.returncode == 75
    assert "check the network and start again" in done.stderr
    machine.fakes.recorded(machine.venv_python)
    assert machine.run("5").returncode == 0
    assert len(machine.installed()) == 2


def test_a_python_without_venv(machine):
    machine.fakes.add("python3", '[ "$1" = -c ]', record=False)
    done = machine.run("5")
    assert done.returncode == 78
    assert "python3-venv" in done.stderr


def test_two_starts_at_once_install_once(machine):
    machine.fakes.recorded(machine.venv_python, '[ "$1" = -m ] && sleep 0.5; exit 0')
    command, environment = [machine.checkout / "launch_worker.sh", "5"], machine.environment()
    starts = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [start.wait(timeout=20) for start in starts] == [0, 0]
    assert len(machine.installed()) == 1


def test_the_worker_does_not_hold_the_lock(machine):
    machine.fakes.recorded(machine.venv_python, '[ "$1" = -m ] || [ ! -e /proc/self/fd/9 ]')
    assert machine.run("5").returncode == 0


def test_another_folder_for_the_environment(machine, tmp_path):
    assert machine.run("5", VENV_DIR=str(tmp_path / "my env")).returncode == 0
    assert (tmp_path / "my env" / ".installed").exists()
    assert not (machine.checkout / ".venv").exists()


def test_a_ready_environment_is_only_read(machine):
    """A container image may hold it on a read-only file system."""

    def entries() -> list[tuple[str, int]]:
        folders = [machine.checkout, machine.checkout / ".venv"]
        return [(p.name, p.stat().st_mtime_ns) for folder in folders for p in sorted(folder.iterdir())]

    machine.run("5")
    before = entries()
    machine.run("5")
    assert entries() == before


def test_sigterm_reaches_the_worker(machine):
    """The worker takes the place of the script: the same process, and its exit code."""
    body = '[ "$1" != -m ] || exit 0\ntrap "exit 143" TERM\necho $$\nwhile true; do sleep 0.02; done'
    machine.fakes.recorded(machine.venv_python, body)
    command = [machine.checkout / "launch_worker.sh", "5"]
    process = subprocess.Popen(
        command, env=machine.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
    finally:
        process.kill()
        process.stdout.close()


def test_demo_runs_the_worker_and_shows_the_result(machine):
    assert machine.run("--demo").returncode == 0
    worker, show = [call for call in machine.fakes.calls("python") if call.arguments[0] != "-m"]
    assert worker.arguments == ["extract_activations.py", "--worker_id", "0"]
    assert worker.environment["MODEL_PATH"] == "examples/demo/model"
    assert worker.environment["DATASET_DIR"] == "examples/demo/streams"
    assert worker.environment["GCS_BUCKET"] == f"file://{machine.checkout}/demo_output/bucket"
    assert show.arguments == ["examples/demo/show.py", "demo_output"]


def test_no_variable_of_the_caller_changes_the_demo(machine):
    foreign = dict.fromkeys([*setting_variables(), *WORKER_ID_VARIABLES], "foreign")
    machine.run("--demo", **foreign)
    worker = machine.fakes.calls("python")[1]
    left = {name for name in setting_variables() if worker.environment.get(name) == "foreign"}
    assert left == {"COMPILATION_CACHE_DIR"}  # where a machine has room for it


def test_demo_takes_no_further_arguments(machine):
    done = machine.run("--demo", "--verbose")
    assert done.returncode == 2
    assert "--demo takes no further arguments" in done.stderr
    assert machine.fakes.calls() == [] and not (machine.checkout / ".venv").exists()


def test_a_failed_demo_fails(machine):
    machine.fakes.recorded(machine.venv_python, '[ "$1" != extract_activations.py ] || exit 75')
    assert machine.run("--demo").returncode == 75
    assert all(call.arguments[0] != "examples/demo/show.py" for call in machine.fakes.calls("python"))


def test_it_runs_from_any_folder(machine):
    """Relative paths are relative to the checkout, wherever it is called from."""
    machine.fakes.recorded(machine.venv_python, '[ "$1" = -m ] || pwd')
    done = machine.run("5")
    assert done.stdout.strip() == os.path.realpath(machine.checkout)


def test_setup_installs_and_ends(machine):
    done = machine.run("--setup")
    assert done.returncode == 0 and len(machine.installed()) == 1
    assert [call.arguments[:2] for call in machine.fakes.calls("python")] == [["-m", "pip"]]
    assert machine.run("--setup", "5").returncode == 2


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_answers_without_installing_and_is_the_workers_where_that_is_done(machine, flag):
    bare = machine.run(flag)
    assert bare.returncode == 0 and "./launch_worker.sh --setup" in bare.stdout
    assert not machine.fakes.calls("python") and not machine.fakes.calls("python3")
    machine.run("--setup")
    machine.run(flag)
    assert machine.worker_arguments() == [flag]
