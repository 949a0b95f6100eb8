"""Exactly once, against every order of crashes, failures and rivals that a seed can think of."""

import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.simulation.mutants import BARE, DELETED, MUTANTS, STALE, TWO_MOMENTS
from tests.simulation.world import Event, Script, explained, fails, run, search, simulated

DEFAULT_CRASHES = 10_000
HALF_A_MILLION = 500_000
RARE = {
    # Dies before it has synced what it deleted; the start after it loses its power.
    DELETED: (
        Script(
            bits=(0,),
            with_bucket=False,
            events=(
                Event(0, "unlink", "force"),
                Event(2, "sync folder", "kill"),
                Event(0, "unlink /m0/out/stats_0001", "power"),
            ),
        ),
        "ahead of",
    ),
    # Forced, m0 dies before its own shard is gone, and once more, with other bits, between the new one's statistics
    # and its name; m1 commits a shard that equals the old one, is forced too, and dies when the bucket is empty.
    STALE: (
        Script(
            bits=(0, 0),
            events=(
                Event(0, "put shard_0001", "force"),
                Event(0, "unlink /m0/out/shard_0001", "bits"),
                Event(0, "rename /m0/out/shard_0001", "kill", 3),
                Event(20, "create /m1/out/shard_0002", "force", 1),
                Event(0, "create /m0/out/shard_0002", "kill", 3),
                Event(0, "delete", "kill", 1),
            ),
        ),
        "the statistics of shard_0001.pkl.gz are others",
    ),
    # A loss of power brings back m1's first shard, which m1, forced, has deleted, but not its statistics; m0 commits a
    # shard that equals it and is forced too; m1 takes up its own before m0 deletes the statistics.
    BARE: (
        Script(
            bits=(0, 0),
            at_once=3,
            events=(
                Event(18, "", "kill", 951),
                Event(19, "put c", "force", 428),
                Event(4, "put c", "switch", 185),
                Event(6, "", "power", 537),
                Event(5, "put sh", "late", 697),
                Event(62, "put c", "switch", 286),
                Event(6, "", "switch", 727),
            ),
        ),
        "stats_0001.safetensors is covered, but was deleted",
    ),
    # m0 reads the checkpoint before, and metadata.json after m1, forced, has replaced both by empty ones.
    TWO_MOMENTS: (
        Script(
            bits=(0, 0),
            events=(
                Event(20, "create /m0/out/shard_0002", "kill", 3),
                Event(0, "stat checkpoint", "force"),
                Event(0, "put checkpoint", "switch", 0),
                Event(0, "stat metadata", "switch", 1),
                Event(0, "delete", "switch", 0),
            ),
        ),
        "shard_0001.pkl.gz is covered, but was deleted",
    ),
}
"""Mutants that only a long search finds: a script that shows each, and what it breaks."""
OLD_DEFECTS = [what for what in MUTANTS if what.endswith("(as before)")]


@pytest.fixture(autouse=True)
def quiet():
    """A message for each of a million failures takes longer than the failures."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def assert_promises_hold(crashes: int, seed: int) -> None:
    """Two processes have half of the crashes each, and seeds of their own."""
    seeds = [seed, seed + HALF_A_MILLION]
    with ProcessPoolExecutor(2, get_context("spawn"), logging.disable, (logging.CRITICAL,)) as pool:
        found = list(pool.map(search, [crashes // 2] * 2, seeds))
    for first, (died, violation, last) in zip(seeds, found, strict=True):
        assert violation is None, explained(last)
        print(f"{died} crashes, seeds {first} to {last}: no promise broken")


def test_ten_thousand_crashes():
    assert_promises_hold(DEFAULT_CRASHES, 0)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_million_crashes(part):
    assert_promises_hold(100_000, (part + 1) * 1_000_000)


def assert_found(what: str) -> None:
    with MUTANTS[what]():
        died, violation, seed = search(DEFAULT_CRASHES)
    print(f"{what}: seed {seed}, after {died} crashes: {violation}")
    assert violation is not None, f"{DEFAULT_CRASHES} crashes do not show that {what}"


@pytest.mark.parametrize("what", OLD_DEFECTS)
def test_old_defects_are_found(what):
    assert_found(what)


@pytest.mark.slow
@pytest.mark.parametrize("what", [what for what in MUTANTS if what not in (*OLD_DEFECTS, *RARE)])
def test_mutants_are_found(what):
    assert_found(what)


def test_a_seed_is_all_there_is_to_a_world():
    with simulated():
        worlds = [run(Script.random(seed)) for seed in (7, 7)]
    assert worlds[0].step == worlds[1].step > 100
    assert worlds[0].crashes == worlds[1].crashes > 0


def test_a_failure_is_shrunk_to_a_short_script():
    with MUTANTS["the folder is not synced"]():
        seed = search(DEFAULT_CRASHES)[2]
        text = explained(seed)
    assert text.startswith(f"seed {seed}: ")
    assert text.count("Event(") <= 3 < len(Script.random(seed).events)
    with simulated():
        assert fails(Script.random(seed)) is None, "the failure is the mutant's"


@pytest.mark.parametrize("what", RARE)
def test_what_only_a_long_search_finds(what):
    script, broken = RARE[what]
    with simulated(), MUTANTS[what]():
        assert broken in str(fails(script))
    with simulated():
        assert run(script).crashes == sum(event.kind not in ("switch", "late") for event in script.events)


OVERTAKEN = Script(
    bits=(0, 1),
    events=(
        Event(0, "put metadata.json", "switch", 1),
        Event(0, "put metadata.json", "switch", 0),
    ),
)


def test_a_script_can_be_written_by_hand():
    with simulated():
        assert run(OVERTAKEN).crashes == 0
