"""Nothing that decides what is stored reads the clock."""

from dataclasses import replace

import pytest

from tests.run_worker.conftest import ROOT
from tests.test_architecture import imported_modules

BACKWARDS = """
import itertools, time
_now, _hours = time.time, itertools.count()
time.time = lambda: _now() - 3600 * next(_hours)
time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.mark.wide
def test_a_clock_that_steps_back_an_hour_at_every_look(cloud, undisturbed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BACKWARDS)
    cloud.killed_at("shard_uploaded:2")
    wrong = replace(cloud.having(PYTHONPATH=str(tmp_path)), forked=False)
    stamps = [line[:8] for line in wrong.run().stderr.splitlines() if " INFO " in line]
    assert stamps != sorted(stamps), "the clock did not step back"
    assert cloud.stored() == undisturbed


DECIDING = (
    *(f"ledger/{name}" for name in ("checks", "schema", "metadata", "checkpoint")),
    *(f"run/{name}" for name in ("resume", "commit", "fingerprint", "job", "pipeline")),
)


@pytest.mark.parametrize("name", DECIDING)
def test_no_clock_is_imported(name):
    file = ROOT / "qwen_jax" / f"{name}.py"
    assert not {module.split(".")[0] for module in imported_modules(file)} & {"time", "datetime", "tqdm"}
    assert "mtime" not in file.read_text()
