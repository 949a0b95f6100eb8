"""Who wrote a run: the versions and the devices that the bits of its shards may depend on, and whether these devices
are known to keep the promises (run/device_check.py)."""

import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from qwen_jax import __version__
from qwen_jax.ledger.checks import DamagedError, parse_json, read_bounded
from qwen_jax.shards.compress import isal_version
from qwen_jax.storage.atomic import write_json

ABSENT = "absent"
DEVICE_CHECK = "device_check"
PASSED, FAILED, NOT_MADE = "passed", "failed", "not made"
_BESIDE_THE_BITS = ("devices", DEVICE_CHECK)


def written_by(devices: Sequence[jax.Device], checks: Path | None = None) -> dict[str, Any]:
    """For metadata.json; none of it is in the fingerprint.

    checks: the folder in which it is remembered that a device check passed (remember_check).
    """
    writer = {
        "toolkit": __version__,
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "isal": isal_version() or ABSENT,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        DEVICE_CHECK: NOT_MADE,
    }
    if checks is not None and says_passed(_remembered(checks, writer), writer):
        writer[DEVICE_CHECK] = PASSED
    return writer


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of `now` (written_by) was otherwise `before` and bits may depend on; nothing of what is not recorded."""
    return [
        f"{name} was {before[name]}, is {now[name]}"
        for name in now
        if name not in _BESIDE_THE_BITS and before.get(name, now[name]) != now[name]
    ]


def in_words(writer: Mapping[str, Any]) -> str:
    """For messages that blame versions; `writer` may be that of a file which records less."""
    return ", ".join(f"{name} {value}" for name, value in writer.items()) or "versions that are not recorded"


def says_passed(claim: Mapping[str, Any], writer: Mapping[str, Any]) -> bool:
    """Whether `claim` says that a check passed with the versions and the kind of device of `writer`."""
    return claim.get(DEVICE_CHECK) == PASSED and all(
        claim.get(name) == value for name, value in writer.items() if name not in _BESIDE_THE_BITS
    )


def remember_check(folder: Path, writer: Mapping[str, Any]) -> None:
    """Keeps a `writer` whose devices have passed, for later starts on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(_check_file(folder, writer), dict(writer))


def _remembered(folder: Path, writer: Mapping[str, Any]) -> dict[str, Any]:
    """What remember_check kept of that kind of device; {} for what cannot be read."""
    try:
        found = parse_json(read_bounded(_check_file(folder, writer)))
    except (OSError, DamagedError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_file(folder: Path, writer: Mapping[str, Any]) -> Path:
    return folder / f"device_check_{re.sub(r'[^0-9A-Za-z]+', '_', writer['device_kind'])}.json"
