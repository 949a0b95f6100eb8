"""The devices that jax computes on: found, or said why not; and what goes wrong on them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from qwen_jax.errors import ConfigError, DeviceError
from qwen_jax.hardware import this_machines_gpus, this_machines_tpu_chips

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def find_devices() -> list[jax.Device]:
    """jax's local devices; raises DeviceError where it finds none, or only a CPU on a machine that has more.

    jax takes the CPU without a word where a TPU is busy, and then computes other bytes a hundred times slower.
    """
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        said = (str(error).splitlines() or ["no reason given"])[0]
        raise DeviceError(
            f"jax finds no devices: {said}; end what else uses them, or choose others with JAX_PLATFORMS"
        ) from error
    if devices[0].platform == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        _refuse_a_hidden_accelerator()
    return devices


def _refuse_a_hidden_accelerator() -> None:
    tpu, gpu = this_machines_tpu_chips(), this_machines_gpus(os.environ)
    if tpu or gpu:
        kind, extra = ("TPU", "tpu") if tpu else ("GPU", "cuda13")
        raise DeviceError(
            f"this machine has a {kind}, but jax finds only the CPU: end the process that uses the {kind}, "
            f"pip install 'jax[{extra}]' if that is missing, or set JAX_PLATFORMS=cpu to compute on the CPU"
        )


@contextmanager
def device_errors() -> Iterator[None]:
    """What a device reports, as one of our errors: too little memory as ConfigError, the rest as DeviceError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = (str(error).splitlines() or ["no reason given"])[0]
        if _OUT_OF_MEMORY in said:
            raise ConfigError(
                f"the device has too little memory ({said}); lower --batch_size or --max_seq_length, ask for fewer "
                "layers, or spread the model over more devices with --model_parallel"
            ) from error
        raise DeviceError(f"the device failed ({said}); start again") from error
