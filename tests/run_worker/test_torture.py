"""Killed anywhere, however often: every sample once, every byte as in an undisturbed run."""

import pytest

from qwen_jax.errors import UsageError
from qwen_jax.run.failpoints import NAMES, VARIABLE, arm
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


@pytest.mark.parametrize("value", ["nowhere", "opened:0", "opened:x", ":1", "opened:1:kill"])
def test_an_unknown_failpoint_is_refused(value):
    with pytest.raises(UsageError) as refused:
        arm({VARIABLE: value})
    assert "checkpoint_stored" in str(refused.value) and repr(value) in str(refused.value)


@pytest.mark.wide
def test_a_worker_starts_with_no_unknown_failpoint(cloud):
    done = cloud.having(QWEN_JAX_FAILPOINT="nowhere").run(expect=2)
    assert "checkpoint_stored" in done.stderr and "'nowhere'" in done.stderr
