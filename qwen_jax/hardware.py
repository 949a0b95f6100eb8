"""What this machine has to compute with, found without jax."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

_ANSWER_S = 60.0


def this_machines_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that a worker may use."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [each for each in environment["CUDA_VISIBLE_DEVICES"].split(",") if each]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, timeout=_ANSWER_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, or none that works
        return []
    return [str(number) for number, _ in enumerate(listed.splitlines())]


def this_machines_tpu_chips() -> int:
    found = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return len(found)


def this_machines_cores() -> list[int]:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # absent on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
