"""Starts of the worker that save its imports: forks of a process that has done them.

Of the five seconds of a start on a small model, four are imports (jax, flax, transformers, Google's storage).
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.waiting import process_state, until

ROOT = Path(__file__).parents[2]

AS_INSTALLED = ROOT / "tests" / "as_installed"
"""On the PYTHONPATH of a command, it hides what only the tests install."""

PRELOAD = [
    "tests.as_installed.sitecustomize",
    "extract_activations",
    "qwen_jax.run.worker",
    "qwen_jax.storage.gcs",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.tokenization_qwen2",
    "tests.run_worker.starts",
]


def run_forked(argv: list[str], variables: dict[str, str], log: Path) -> None:
    """The child's side of a start without the imports."""
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from extract_activations import main
    from qwen_jax.cli import run_script

    run_script(lambda _: main(argv))


class Start:
    """One running worker, forked or executed, with its output in `log`."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, *, forked: bool = True):
        """command: as for subprocess, python and the script first."""
        self.command = command
        self._forked, self._log = forked, log
        if forked:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
            self._process = context.Process(target=run_forked, args=(command[2:], environment, log))
            self._process.start()
        else:
            plain = {
                "PYTHONPATH": str(AS_INSTALLED)
            } | environment  # a test may change the worker by a path of its own
            with log.open("a") as file:
                self._process = subprocess.Popen(command, cwd=ROOT, env=plain, stdout=file, stderr=file)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode if self._forked else self._process.poll()

    def send_signal(self, number: int) -> None:
        """Does nothing once it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def until(self, condition: Callable[[], object]) -> None:
        """Waits for a condition while the process lives; never for an amount of time."""

        def is_true() -> object:
            assert self.poll() is None, f"the worker ended before the condition came true: {self.output()}"
            return condition()

        until(is_true, 120)

    def until_stopped(self) -> None:
        """Waits until a signal has stopped it."""
        self.until(lambda: process_state(self.pid) == "T")

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits for the end; returns the exit code. One that is forked may be late: None."""
        self._process.join(seconds) if self._forked else self._process.wait(seconds)
        return self.poll()

    def output(self) -> str:
        return self._log.read_text()
