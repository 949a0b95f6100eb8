"""Which workers are meant, and the settings that each is given."""

import re
from argparse import ArgumentTypeError
from collections.abc import Collection, Mapping

from qwen_jax.errors import UsageError
from qwen_jax.settings import variables

SECRETS = ("HF_TOKEN",)
"""What nobody may read who reads a log."""
PLACES = tuple(variables(local=True))
"""Folders of this machine: for workers whose file system looks like it, not for containers."""
PASSED_ON = (
    *(name for name in variables(local=False) if name != "UPLOAD_TO_GCS"),
    *(*PLACES, "VERBOSE", "JAX_PACKAGE", *SECRETS),
)
"""Every variable of the worker's and of launch_worker.sh's, but for its id and UPLOAD_TO_GCS."""
_MOST = 100_000


def number_of_workers(text: str) -> int:
    """An argparse type: 1, 2, ...; nothing that a shell would read otherwise."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text, re.ASCII):
        raise ArgumentTypeError(f"the number of workers must be a whole number above 0, got {text!r}")
    return int(text)


def parse_workers(text: str) -> tuple[int, ...]:
    """An argparse type: `3,7-9` is 3, 7, 8, 9; each once, in ascending order."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST:
            raise ArgumentTypeError(f"workers are listed like 3,7-9, got {text!r}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def settings_of(environment: Mapping[str, str], *, without: Collection[str] = ()) -> dict[str, str]:
    """The worker's variables that are set here, in a fixed order."""
    names = [name for name in PASSED_ON if name not in without]
    return {name: environment[name] for name in names if environment.get(name)}


def secrets_of(environment: Mapping[str, str]) -> str:
    """The secrets that are set, one a line, for a command that reads them; raises UsageError for one of two lines."""
    values = [environment[name] for name in SECRETS if environment.get(name)]
    if any("\n" in value for value in values):
        raise UsageError(f"{' and '.join(SECRETS)} must be one line")
    return "".join(f"{value}\n" for value in values)


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """For printing: `...` stands for each secret that is set."""
    hidden = {name: "..." for name in SECRETS if environment.get(name)}
    return {**environment, **hidden}


def bucket_name(environment: Mapping[str, str]) -> str:
    """GCS_BUCKET without gs://, where it must be a bucket and nothing else; raises UsageError."""
    name = environment["GCS_BUCKET"].removeprefix("gs://").rstrip("/")
    if not name or "/" in name:
        raise UsageError(
            f"GCS_BUCKET must be the name of a Cloud Storage bucket here, got {environment['GCS_BUCKET']!r}"
        )
    return name


def listed(workers: Mapping[int, object] | tuple[int, ...] | list[int]) -> str:
    """`1 3 8`, for messages."""
    return " ".join(map(str, sorted(workers)))
