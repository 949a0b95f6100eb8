"""Runs other people's command line tools."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.errors import StorageError

CALL_LIMIT_S = 900.0


class CommandError(StorageError):
    """A tool could not do it; str is what it said."""


def call(command: Sequence[str], folder: Path | None = None, given: str = "") -> str:
    """Runs a command in `folder` or here and returns what it printed; raises CommandError.

    given: what it reads from its standard input, which nobody sees in a list of processes.
    """
    try:
        done = subprocess.run(
            command, input=given.encode(), capture_output=True, timeout=CALL_LIMIT_S, cwd=folder
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"{command[0]} gave no answer in {CALL_LIMIT_S:.0f} s") from error
    except OSError as error:
        raise CommandError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise CommandError(said or f"{command[0]} ended with exit code {done.returncode} and said nothing")
    return done.stdout.decode(errors="replace")
