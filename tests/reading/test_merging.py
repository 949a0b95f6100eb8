"""Statistics of many shards are merged one at a time: a run may have thousands, of megabytes each."""

import weakref

import pytest

from qwen_jax.ledger.names import STATS_NAME
from qwen_jax.reading import verify
from qwen_jax.reading.merged_stats import merged_stats
from qwen_jax.reading.runs import Run, open_runs
from qwen_jax.run.places import Places
from qwen_jax.run.run_stats import StoredStats
from qwen_jax.shards import statistics
from qwen_jax.shards.statistics import stats_bytes

FEW = 3
"""What is merged so far, the next, and what they give."""


def by_a_worker(run: Run, copy) -> bytes:
    return stats_bytes(StoredStats(Places(copy.folder, None, "", None), run.kinds).merged(run.ledger.shards))


def by_a_reader(run: Run, copy) -> bytes:
    (copy.folder / STATS_NAME).unlink()
    return stats_bytes(merged_stats([run]))


def by_verify(run: Run, copy) -> bytes:
    assert list(verify._statistics(run)) == []
    return (copy.folder / STATS_NAME).read_bytes()


@pytest.mark.parametrize("merged", [by_a_worker, by_a_reader, by_verify])
def test_few_are_held_at_a_time(copy, monkeypatch, merged):
    seen, alive, parse = [], [], statistics.parse_stats

    def parse_and_count(data, name):
        stats = parse(data, name)
        seen.append(weakref.ref(stats["residual"]))
        alive.append(sum(each() is not None for each in seen))
        return stats

    for module in (statistics, verify):
        monkeypatch.setattr(module, "parse_stats", parse_and_count)
    whole = (copy.folder / STATS_NAME).read_bytes()
    (run,) = open_runs(copy.folder)
    assert merged(run, copy) == whole
    assert len(alive) >= len(run.shards) > FEW >= max(alive)
