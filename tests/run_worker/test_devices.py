"""Devices that are missing, busy or too small: a message and an exit code, and never a silent CPU."""

from dataclasses import replace

import jax
import pytest

from extract_activations import main
from qwen_jax.errors import ConfigError, DeviceError, WriterConflictError
from qwen_jax.ledger.names import progress_name
from qwen_jax.ledger.progress_record import ProgressRecord
from qwen_jax.run import devices, job, worker
from qwen_jax.run.devices import device_errors, find_devices
from qwen_jax.run.exclusive import exclusive_folders


@pytest.fixture
def machine(monkeypatch):
    """A machine with neither TPU nor GPU, on which nobody chose a platform."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(devices, "this_machines_tpu_chips", lambda: 0)
    monkeypatch.setattr(devices, "this_machines_gpus", lambda environment: [])
    return monkeypatch


def test_a_machine_without_accelerator(machine):
    assert find_devices() == jax.local_devices()


@pytest.mark.parametrize(
    "finder, found, words",
    [("this_machines_tpu_chips", 4, "jax[tpu]"), ("this_machines_gpus", ["0"], "jax[cuda13]")],
)
def test_the_cpu_does_not_stand_in_for_an_accelerator(machine, finder, found, words):
    machine.setattr(devices, finder, lambda *_: found)
    with pytest.raises(DeviceError) as raised:
        find_devices()
    assert words in str(raised.value) and "JAX_PLATFORMS=cpu" in str(raised.value)
    machine.setenv("JAX_PLATFORMS", "cpu")
    assert find_devices()


@pytest.mark.wide
def test_the_worker_says_that_jax_finds_no_devices(workspace):
    started_afresh = replace(workspace.having(JAX_PLATFORMS="cuda"), forked=False)
    done = started_afresh.run(expect=75)
    assert "jax finds no devices" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "said, kind, code",
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.\nmore", ConfigError, 78),
        ("UNAVAILABLE: TPU is gone", DeviceError, 75),
    ],
)
def test_what_a_device_reports(said, kind, code):
    with pytest.raises(kind) as raised, device_errors():
        raise jax.errors.JaxRuntimeError(said)
    assert raised.value.exit_code == code and said.splitlines()[0] in str(raised.value)


def test_a_second_start_of_a_running_worker_touches_neither_the_device_nor_its_record(workspace, monkeypatch):
    def busy() -> list[jax.Device]:
        raise DeviceError("the TPU is in use")

    monkeypatch.setattr(job, "find_devices", busy)
    monkeypatch.setattr(worker, "reuse_freed_memory", lambda: None)  # for good, in this process
    monkeypatch.setenv("PROGRESS_INTERVAL_S", "60")
    record = workspace.checkpoint.with_name(progress_name(5))
    with exclusive_folders([workspace.output, record.parent], 5):
        record.write_text("of the worker that runs")
        with pytest.raises(WriterConflictError, match="another process on this machine"):
            main(workspace.command()[2:])
    assert record.read_text() == "of the worker that runs"
    with pytest.raises(DeviceError):
        main(workspace.command()[2:])
    left = ProgressRecord.parse(record.read_bytes())
    assert (left.status, left.exit_code, left.message) == ("failed", 75, "the TPU is in use")
