"""What this machine has to compute with, found without jax."""

import os
from collections.abc import Mapping
from pathlib import Path

from qwen_jax.fleet.command import CommandError, call


def this_machines_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that a worker may use."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [each for each in environment["CUDA_VISIBLE_DEVICES"].split(",") if each]
    try:
        return [str(i) for i, _ in enumerate(call(["nvidia-smi", "-L"]).splitlines())]
    except CommandError:
        return []


def this_machines_tpu_chips() -> int:
    found = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return len(found)


def this_machines_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):  # absent on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
