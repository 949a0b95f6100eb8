"""A hundred simulated fleets, each for days: every worker completes, and the supervisor does nothing wrong."""

import statistics

import pytest

from qwen_jax.fleet.monitor import ALIVE, STALLED, STALLED_AFTER_S, exit_code
from qwen_jax.ledger.schema import COMPLETED, FAILED, NOT_STARTED
from tests.fleet.simulated import BEGINNING, HOUR, SHARD_S, Fleet, Report, World, states

SEEDS = 100


class Monitor:
    """Looks at half of the fleet once, after so many hours, and compares what it sees with how the world is."""

    def __init__(self, hours: float):
        self._at = BEGINNING + hours * HOUR
        self.seen: set[str] = set()

    def __call__(self, world: World) -> None:
        if self.seen or world.now < self._at:
            return
        for state in states(world, range(world.seed % 2, world.count, 2)):
            assert state.state in self._possible(world, state.worker), (world.seed, state)
            assert state.durable == world.workers[state.worker].checkpoint["total_samples_processed"]
            self.seen.add(state.state)

    @staticmethod
    def _possible(world: World, number: int) -> tuple[str, ...]:
        worker = world.workers[number]
        if worker.finished_at is not None:
            return (COMPLETED,)
        if worker.record is None:
            return (NOT_STARTED,)
        if worker.process is not None:
            return ALIVE
        if worker.record.status == FAILED:
            return (FAILED,)
        return (STALLED,) if world.now - worker.record.updated_at > STALLED_AFTER_S else ALIVE


def run(seed: int, monitor: Monitor | None = None, **options: float) -> Report:
    """A fleet to its end; fails where anything was wrong."""
    monitor = monitor or Monitor(hours=seed % 40)
    fleet = Fleet(seed, looks=monitor, **options)
    outcome = fleet.run()
    assert (fleet.world.wrong, outcome.given_up) == ([], {}), seed
    assert len(outcome.finished) == len(fleet.world.workers)
    assert exit_code(states(fleet.world, range(seed % 8, fleet.count, 8))) == 0
    return fleet.report()


def test_a_hundred_fleets():
    monitors = [Monitor(hours=seed % 40) for seed in range(SEEDS)]
    reports = [run(seed, monitor) for seed, monitor in enumerate(monitors)]
    assert all(monitor.seen for monitor in monitors)
    assert set().union(*(each.seen for each in monitors)) >= {COMPLETED, FAILED, STALLED, NOT_STARTED, *ALIVE}
    # What makes it a test of anything: it lasts, machines are lost, and so are supervisors.
    assert statistics.median(each.hours for each in reports) > 40
    assert sum(each.preempted for each in reports) > 200 * SEEDS
    assert sum(each.controls for each in reports) > SEEDS and sum(each.refused for each in reports) > SEEDS
    # A machine that is lost costs half a shard on average.
    lost = sum(each.repeated for each in reports) * HOUR / sum(each.preempted for each in reports)
    assert lost == pytest.approx(SHARD_S / 2, rel=0.2)


@pytest.mark.parametrize("seed", range(5))
def test_at_the_default_pace_nothing_is_wrong_either(seed):
    """It sees machines that are being made, and workers between two shards."""
    report = run(seed, poll_s=60.0, count=12)
    assert report.machine > report.work


def test_a_seed_is_one_fleet():
    assert run(3, count=8) == run(3, count=8) != run(4, count=8)
