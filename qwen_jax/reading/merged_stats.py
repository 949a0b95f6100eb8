"""Statistics of all rows of many shards."""

from collections.abc import Iterator, Sequence
from itertools import chain

from qwen_jax.bar import with_bar
from qwen_jax.errors import BadDataError
from qwen_jax.ledger.names import STATS_NAME, stats_name_beside
from qwen_jax.reading.runs import Run
from qwen_jax.reading.samples import listed_shard
from qwen_jax.shards.statistics import Stats, first_whole, merge_stats, shard_stats


def merged_stats(runs: Sequence[Run]) -> Stats:
    """Of all rows at `runs` together: from the stored statistics, else from the shards themselves, one at a time.

    Raises BadDataError for runs whose kinds, layers or widths differ, and where there is no row.
    """
    found = (stats for run in runs for stats in _of_run(run))
    first = next(found, None)
    if first is None:
        raise BadDataError(f"{', '.join(run.where for run in runs)}: no sample is stored there yet")
    return merge_stats(chain([first], found))


def groups_alike(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs with the same kinds, layers and model together, in the order of the first of each."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        said = run.metadata
        of_run = (said["layers"], said["model"]["weights_digest"]) if said else None
        groups.setdefault((str(run.kinds), str(of_run)), []).append(run)
    return list(groups.values())


def _of_run(run: Run) -> Iterator[Stats]:
    if run.ledger is not None and not run.is_part:
        whole = first_whole(_copies(run, STATS_NAME), run.ledger.totals()["tokens"])
        if whole is not None:
            yield whole
            return
    yield from (_of_shard(run, name) for name in with_bar(run.shards, len(run.shards)))


def _of_shard(run: Run, name: str) -> Stats:
    entry = run.entry(name)
    if entry is not None:
        stats = first_whole(_copies(run, stats_name_beside(name)), entry["tokens"])
        if stats is not None:
            return stats
    return shard_stats(listed_shard(run, name), run.kinds)


def _copies(run: Run, name: str) -> Iterator[tuple[bytes, str]]:
    data = run.files.read(name)
    if data is not None:
        yield data, f"{run.where}/{name}"
