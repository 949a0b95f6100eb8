"""A bucket that fails or stalls, and SIGTERM at bad moments: the right exit code, and nothing lost."""

import os
import signal
import sys
import time
from dataclasses import replace

import pytest

from qwen_jax.run.shutdown import GRACE_S
from qwen_jax.storage.checksum import file_crc32c
from tests.fake_gcs import Fault
from tests.run_worker.starts import Start
from tests.run_worker.test_rivals import assert_uploaded_first, kept_shards, total_shards

SECOND = "shard_0002.pkl.gz"


def terminate(process: Start) -> str:
    """Sends SIGTERM, fails unless the worker exits with 143 within 10 s, returns what it said."""
    started = time.monotonic()
    process.terminate()
    code, errors = process.wait(60), process.output()
    assert code == 143, errors
    assert time.monotonic() - started < 10
    assert "Traceback" not in errors
    return errors


def test_a_shard_that_cannot_be_stored_ends_with_75_and_is_kept(cloud, undisturbed):
    cloud.server.faults = [Fault("status", "POST", name=SECOND, times=10**9)]
    done = cloud.having(GCS_RETRY_BUDGET_S="1").run(expect=75)
    kept = cloud.output / "shard_0002.pkl.gz"
    assert f"the local file {kept} is kept" in done.stderr and "start again" in done.stderr
    assert "Traceback" not in done.stderr
    entry = cloud.metadata()["shards"][1]
    assert file_crc32c(kept) == (entry["bytes"], entry["crc32c"])
    assert "shard_0002.pkl.gz" not in cloud.stored()
    cloud.server.faults.clear()
    kept, before = kept_shards(cloud), len(cloud.uploads())
    assert kept[0] == SECOND
    cloud.run()
    assert_uploaded_first(cloud, before, kept)
    assert cloud.stored() == undisturbed


@pytest.mark.wide
def test_sigterm_during_a_stalled_upload(cloud, undisturbed):
    stall = Fault("stall", "POST", name=SECOND)
    cloud.server.faults = [stall]
    process = cloud.start()
    process.until(lambda: stall.seen and total_shards(cloud) == 1)
    errors = terminate(process)
    assert "the next start resumes from the last checkpoint" in errors
    kept, before = kept_shards(cloud), len(cloud.uploads())
    assert kept[0] == SECOND
    cloud.run()
    assert_uploaded_first(cloud, before, kept)
    assert cloud.stored() == undisturbed


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [(signal.SIGINT, "Ctrl-C", 130), pytest.param(signal.SIGTERM, "SIGTERM", 143, marks=pytest.mark.wide)],
)
def test_stopped_between_retries(cloud, undisturbed, number, name, code):
    """With the real command line."""
    failing = Fault("status", "POST", name=SECOND, times=10**9)
    cloud.server.faults = [failing]
    process = replace(cloud, forked=False).start()
    process.until(lambda: failing.seen > 1 and total_shards(cloud) == 1)
    process.send_signal(number)
    assert process.wait(60) == code, process.output()
    assert f"extract_activations.py: {name}: stopped while waiting to write gs://" in process.output()
    assert "the local file" in process.output() and "is kept" in process.output()
    cloud.server.faults.clear()
    cloud.run()
    assert cloud.stored() == undisturbed


@pytest.mark.wide
def test_sigterm_during_compilation(cloud, undisturbed):
    cold = replace(cloud, cache=cloud.root / "cold_cache")
    process = cold.start()
    process.until(lambda: "compiling the step" in process.output())
    terminate(process)
    assert not any(name.startswith("shard_") for name in cloud.stored())
    cloud.run()
    assert cloud.stored() == undisturbed


FOREIGN = (
    "import ctypes, sys\n"
    "from qwen_jax.cli import run_script\n"
    "from qwen_jax.run.shutdown import run_until_stopped\n"
    "def work(stop):\n"
    "    print('busy', file=sys.stderr, flush=True)\n"
    "    stop.wait()\n"
    "    print('stopping', file=sys.stderr, flush=True)\n"
    "    ctypes.CDLL(None).poll(None, 0, 60_000)\n"
    "run_script(lambda _: run_until_stopped(work))\n"
)
"""As a long compilation does: foreign code that returns after a minute and knows no signals."""


@pytest.fixture
def foreign(tmp_path):
    process = Start([sys.executable, "-c", FOREIGN], dict(os.environ), tmp_path / "log", forked=False)
    process.until(lambda: "busy" in process.output())
    return process


@pytest.mark.wide
def test_sigterm_while_foreign_code_runs_for_long(foreign):
    assert "cut off after 8 s" in terminate(foreign)


def test_a_second_ctrl_c_ends_at_once(foreign):
    foreign.send_signal(signal.SIGINT)
    foreign.until(lambda: "stopping" in foreign.output())
    started = time.monotonic()
    foreign.send_signal(signal.SIGINT)
    assert foreign.wait(60) == 130 and time.monotonic() - started < GRACE_S
    assert "Ctrl-C: cut off at once" in foreign.output()
