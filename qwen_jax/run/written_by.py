"""Who wrote a run: the versions and the devices that the bits of its shards may depend on."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax

from qwen_jax import __version__
from qwen_jax.shards.compress import isal_version

ABSENT = "absent"
_COUNT = "devices"


def written_by(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """For metadata.json; none of it is in the fingerprint."""
    return {
        "toolkit": __version__,
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "isal": isal_version() or ABSENT,
        "device_kind": devices[0].device_kind,
        _COUNT: len(devices),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of `now` (written_by) was otherwise `before` and bits may depend on; nothing of what is not recorded."""
    return [
        f"{name} was {before[name]}, is {now[name]}"
        for name in now
        if name != _COUNT and before.get(name, now[name]) != now[name]
    ]


def in_words(writer: Mapping[str, Any]) -> str:
    """For messages that blame versions; `writer` may be that of a file which records less."""
    return ", ".join(f"{name} {value}" for name, value in writer.items()) or "versions that are not recorded"
