"""Starts of the worker that save its imports: forks of a process that has done them.

Of the five seconds of a start on a small model, four are imports (jax, flax, transformers, Google's storage).
"""

import multiprocessing
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

PRELOAD = [
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
        self._forked = forked
        if forked:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
            self._process = context.Process(target=run_forked, args=(command[2:], environment, log))
            self._process.start()
        else:
            with log.open("a") as file:
                self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode if self._forked else self._process.poll()

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """Waits for the end; returns the exit code."""
        self._process.join() if self._forked else self._process.wait()
        return self.code
