"""Killed anywhere, however often: every sample once, every byte as in an undisturbed run."""

import pytest

from qwen_jax.run.failpoints import NAMES
from tests.run_worker.torture import Torture


def assert_unharmed(result, kills: int) -> None:
    print(result)
    assert result.kills >= kills
    assert set(NAMES) <= set(result.hits), "a failpoint was never reached"
    assert (result.lost, result.duplicated, result.ahead, result.torn, result.different) == (0, 0, 0, 0, [])


@pytest.mark.wide
def test_twenty_kills(inputs, tmp_path):
    assert_unharmed(Torture(inputs, tmp_path, seed=1).run(20), 20)


@pytest.mark.slow
def test_five_hundred_kills_and_five_hundred_stops(inputs, tmp_path):
    result = Torture(inputs, tmp_path, seed=2).run(500, stops=500)
    assert_unharmed(result, 500)
    assert result.stops >= 500 and result.overtaken > 100, "most rivals came too late to prove anything"


@pytest.mark.parametrize("value", ["nowhere", "opened:0", "opened:x", ":1"])
def test_an_unknown_failpoint_is_refused(cloud, value):
    done = cloud.having(QWEN_JAX_FAILPOINT=value).run(expect=2)
    assert "checkpoint_stored" in done.stderr and repr(value) in done.stderr
