"""Statistics of all rows of many shards."""

from collections.abc import Sequence

from qwen_jax.errors import BadDataError
from qwen_jax.reading.runs import Run
from qwen_jax.shards import load_shard
from qwen_jax.shards.statistics import (
    STATS_NAME,
    Stats,
    merge_stats,
    parse_stats,
    shard_stats,
    shard_stats_name,
)


def merged_stats(runs: Sequence[Run]) -> Stats:
    """Of all rows at `runs` together: from the stored statistics, else from the shards themselves, one at a time.

    Raises BadDataError for runs whose kinds, layers or widths differ, and where there is no row.
    """
    return merge_stats([stats for run in runs for stats in _of_run(run)])


def _of_run(run: Run) -> list[Stats]:
    whole = _stored(run, STATS_NAME)
    if whole is not None and run.metadata is not None:
        tokens = sum(entry["tokens"] for entry in run.metadata["shards"])
        if next(iter(whole.values())).count == tokens:
            return [whole]
    return [_of_shard(run, number, name) for number, name in enumerate(run.shards)]


def _of_shard(run: Run, number: int, name: str) -> Stats:
    if run.metadata is not None:
        stats = _stored(run, shard_stats_name(number + 1))
        if stats is not None and next(iter(stats.values())).count == run.metadata["shards"][number]["tokens"]:
            return stats
    with run.place.local(name) as path:
        return shard_stats(load_shard(path), run.kinds)


def _stored(run: Run, name: str) -> Stats | None:
    """None where it is not there, or not whole: then the shards know."""
    data = run.place.read(name)
    try:
        return None if data is None else parse_stats(data, name)
    except BadDataError:
        return None
