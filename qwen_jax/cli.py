"""Flags as all our scripts take them: flag, then environment variable, then default."""

import argparse
import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from qwen_jax.errors import CancelledError, ConfigError, TerminatedError, ToolkitError, UsageError, shown

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


def parse_bool(text: str) -> bool:
    """Reads a yes/no environment variable; raises ValueError on anything else."""
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise ValueError(f"expected true or false, got {text!r}")


def variable_of(flag: str) -> str:
    """The environment variable of a flag that names none of its own."""
    return flag.upper()


class FlagParser(argparse.ArgumentParser):
    """argparse whose flags may carry an environment variable, and whose --help shows it.

    Flags are spelled with underscores; dashes are accepted (`--batch-size` is `--batch_size`).
    """

    def __init__(self, *, env_for_all: bool = False, **kwargs: Any):
        """env_for_all: every flag has the variable of its own name in capitals, unless it says otherwise."""
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self._env_for_all = env_for_all
        self._env_flags: list[tuple[argparse.Action, str]] = []

    def switch(self, name: str, help: str, *, env: str | None = None) -> None:
        """Adds a `--name` that is either there or not."""
        self.flag(name, help, env=env, default=False, action="store_true")

    def flag(
        self, name: str, help: str, *, env: str | None = None, default: Any = None, **kwargs: Any
    ) -> None:
        """Adds `--name`; `env` names the variable that is read where the flag is absent ("": none)."""
        if env is None:
            env = variable_of(name) if self._env_for_all else ""
        shown = "off" if default is False else "none" if default in (None, "") else default
        if isinstance(default, list):
            shown = " ".join(default)
        notes = "" if kwargs.get("required") else f"default: {shown}"
        if env:
            notes += f"{', ' if notes else ''}variable: {env}"
        text = f"{help} [{notes}]" if notes else help
        action = self.add_argument(f"--{name}", help=text.replace("%", "%%"), default=default, **kwargs)
        if env:
            self._env_flags.append((action, env))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = [_with_underscores(arg) for arg in (sys.argv[1:] if args is None else args)]
        self._apply_environment()
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage; exits with 2."""
        self.exit(UsageError.exit_code, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def _apply_environment(self) -> None:
        for action, env in self._env_flags:
            if env not in os.environ or (os.environ[env] == "" and action.nargs != 0):
                continue
            try:
                action.default = self._value_from_text(action, os.environ[env])
            except (ValueError, argparse.ArgumentTypeError) as error:
                self.error(f"environment variable {env}: {error}")
            action.required = False

    def _value_from_text(self, action: argparse.Action, text: str) -> Any:
        if action.nargs == 0:
            return parse_bool(text)
        convert = action.type or str
        values = [convert(word) for word in (text.split() if action.nargs == "+" else [text])]  # type: ignore[operator]
        for value in values:
            if action.choices is not None and value not in action.choices:
                choices = ", ".join(map(str, action.choices))
                raise ValueError(f"invalid choice {value!r} (choose from {choices})")
        return values if action.nargs == "+" else values[0]


def _with_underscores(arg: str) -> str:
    if not arg.startswith("--") or arg == "--":
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return _whole_number(text, least=1)


def non_negative_int(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    return _whole_number(text, least=0)


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of {least} or more, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    return _number(text, lambda value: 0 < value < float("inf"), "a number above 0")


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number, 0 or more."""
    return _number(text, lambda value: 0 <= value < float("inf"), "a number, 0 or more")


def seconds(text: str) -> float:
    """An argparse type: a finite number of seconds, 0 or more."""
    return _number(text, lambda value: 0 <= value < 1e9, "a number of seconds, 0 or more")


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not fits(value):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value


def say(line: object) -> None:
    """Prints a line for people."""
    print(shown(str(line)), flush=True)


def log_to_terminal(line: str, datefmt: str | None = None) -> None:
    """Log messages go to stderr as `line` says."""
    handler = logging.StreamHandler()
    handler.setFormatter(ShownFormatter(line, datefmt))
    logging.basicConfig(handlers=[handler])


class ShownFormatter(logging.Formatter):
    """Log messages as a terminal may show them: they quote streams, shards and buckets."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), lines=True)


def run_script(main: Callable[[Sequence[str] | None], int | None]) -> None:
    """Runs a script's main and turns our errors into one clear line and their exit code."""
    name = os.path.basename(sys.argv[0])
    name = "python -m qwen_jax" if name == "__main__.py" else name
    try:
        code = main(None)
    except ToolkitError as error:
        kind = "" if isinstance(error, TerminatedError) else "error: "
        print(f"{name}: {kind}{error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "qwen_jax":
            raise
        advice = (
            "run this with .venv/bin/python, or pip install -r requirements.txt; where this is no checkout, "
            "pip install 'qwen-jax[worker,gcs]'"
        )
        print(
            f"{name}: error: the package {error.name} is missing; {advice}",
            file=sys.stderr,
        )
        code = ConfigError.exit_code
    except KeyboardInterrupt:
        print(f"{name}: Ctrl-C: stopped", file=sys.stderr, flush=True)
        code = CancelledError.exit_code
    _end(code or 0)


def _end(code: int) -> NoReturn:
    """Ends the process; at once where a daemon thread still runs, since Python's own end aborts a process of which one
    is in foreign code ("exception not rethrown"). A Ctrl-C changes the code no more: while other threads end it cuts
    them off, later it is not heard."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.daemon for thread in threading.enumerate()):
        os._exit(code)
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(code))
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
