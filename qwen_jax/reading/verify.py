"""Whether what lies there is a whole run: every sample once, every byte as recorded."""

from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any

from qwen_jax.bar import with_bar
from qwen_jax.data.streams import stream_summary
from qwen_jax.errors import BadDataError
from qwen_jax.ledger.checkpoint import parse_checkpoint
from qwen_jax.ledger.checks import DamagedError, parse
from qwen_jax.ledger.names import METADATA_NAME, STATS_NAME, checkpoint_name, shard_number, stats_name_beside
from qwen_jax.ledger.schema import COMPLETED, STREAMS
from qwen_jax.reading.runs import HOW_TO_RESTORE, DescribedRun, Run, is_bucket_url, plain, read_any
from qwen_jax.reading.verify_shard import ShardFaults
from qwen_jax.shards.statistics import Stats, merge_stats, parse_stats, stats_bytes

_MAY_DIFFER = ("stream_sha256", "max_samples", "layers")
"""Fields of the fingerprint in which the workers of one dataset may differ; layers only if they share none."""


@dataclass(frozen=True)
class Fault:
    """Something wrong. where: the file; run, shard: where it is a shard's bytes, so that it can be made again."""

    where: str
    what: str
    run: Run | None = None
    shard: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Verified:
    """What was read: every fault found, none for a clean set, and how much is stored."""

    faults: list[Fault]
    workers: int
    shards: int
    samples: int


def verify_runs(runs: Sequence[Run], streams: str | Path | None = None, jobs: int = 1) -> Verified:
    """Reads everything at `runs` (open_runs with damaged_too).

    streams: the `streams.json` that the workers' streams were made with, to check that no worker is missing. jobs:
    shards that are read, and held in memory, at a time. Raises BadDataError for what is no streams.json.
    """
    checks = [_RunCheck(run) for run in runs]
    with ThreadPoolExecutor(jobs) as pool:
        faults = [fault for check in checks for fault in check.faults(pool)]
    described = [run for run in runs if isinstance(run, DescribedRun)]
    faults += _unlike_workers(described)
    if streams is not None:
        faults += _against_streams(described, streams)
    shards = sum(len(run.shards) for run in runs)
    return Verified(faults, len(runs), shards, sum(check.samples for check in checks))


class _RunCheck:
    """One worker's shards and what metadata.json says of them. samples: those that were read."""

    def __init__(self, run: Run):
        self._run = run
        self.samples = 0

    def faults(self, pool: Executor) -> list[Fault]:
        run = self._run
        faults: list[Fault] = []
        stored: list[range] = []
        for check, found in with_bar(zip(*self._of_shards(pool), strict=True), len(run.shards)):
            shard = check.name if check.can_be_made_again else None
            faults += [Fault(f"{run.where}/{check.name}", what, run, shard) for what in found]
            stored += check.spans()
            self.samples += len(check.indices)
        if run.is_part:
            return faults
        if not isinstance(run, DescribedRun):
            return [self._without_metadata(), *faults]
        return [*_files(run), *faults, *_bookkeeping(run, stored), *_sums(run), *_statistics(run)]

    def _of_shards(self, pool: Executor) -> tuple[list[ShardFaults], Iterator[list[str]]]:
        checks = [ShardFaults(self._run, name) for name in self._run.shards]
        return checks, pool.map(ShardFaults.find, checks)

    def _without_metadata(self) -> Fault:
        what = "is missing, so that missing samples cannot be seen"
        if self._run.damage:
            what = f"{self._run.damage}; {HOW_TO_RESTORE}"
        return Fault(f"{self._run.where}/{METADATA_NAME}", what)


def _files(run: DescribedRun) -> Iterator[Fault]:
    """Shards that nobody lists, and a checkpoint that says something else."""
    names = run.files.names()
    for name in names:
        if shard_number(name) is not None and run.entry(name) is None:
            yield Fault(
                f"{run.where}/{name}", "is not listed in metadata.json; a restarted worker replaces it"
            )
    name = checkpoint_name(run.worker_id)
    if name in names:
        yield from _checkpoint(run, name)


def _checkpoint(run: DescribedRun, name: str) -> Iterator[Fault]:
    where = f"{run.where}/{name}"
    try:
        record = parse_checkpoint(run.files.read(name) or b"")
    except DamagedError as error:
        yield Fault(where, f"is damaged ({error}); a restarted worker makes it again")
        return
    said = [record.status, record.last_processed_sample_idx, record.total_shards]
    known = [run.ledger.status, run.ledger.last_processed_sample_idx, len(run.shards)]
    if said != known:
        yield Fault(where, f"says {said}, metadata.json {known}")


def _bookkeeping(run: DescribedRun, stored: list[range]) -> Iterator[Fault]:
    """Every line of the stream is stored or skipped, once."""
    metadata, ledger, where = run.metadata, run.ledger, f"{run.where}/{METADATA_NAME}"
    limit, lines = metadata["fingerprint"]["max_samples"], metadata["dataset"]["lines"]
    lines = lines if limit is None else min(lines, limit)
    reached = ledger.next_sample_idx
    if ledger.status != COMPLETED or reached < lines:
        yield Fault(
            where, f"unfinished: samples {reached} to {lines - 1} are still to come; start the worker again"
        )
    cover = _Cover([*stored, *(_one(note) for note in ledger.skipped)], reached)
    noted = _Cover([*map(_one, (*ledger.truncated, *ledger.shortened))], 0).all
    for spans, what in (
        (cover.twice, "stored or skipped twice"),
        (cover.missing, "missing"),
        (cover.beyond, "beyond the end"),
        (_without(noted, stored), "noted as cut or shortened, but not stored"),
    ):
        if spans:
            yield Fault(where, f"{what}: samples {_shorten(spans)}")


def _one(note: Mapping[str, Any]) -> range:
    return range(note["sample_idx"], note["sample_idx"] + 1)


class _Cover:
    """What spans of sample indices cover of 0 to `end`, by spans alone: a file may name any number of samples.

    all: each index once, in order. twice, missing, beyond: likewise.
    """

    def __init__(self, spans: Iterable[range], end: int):
        self.all: list[range] = []
        self.twice: list[range] = []
        self.missing: list[range] = []
        self.beyond: list[range] = []
        reached = doubled = 0
        for span in sorted(spans, key=lambda span: (span.start, span.stop)):
            _add(self.missing, reached, min(span.start, end))
            _add(self.twice, max(span.start, doubled), min(span.stop, reached))
            doubled = max(doubled, min(span.stop, reached))
            _add(self.all, max(span.start, reached), span.stop)
            _add(self.beyond, max(span.start, reached, end), span.stop)
            reached = max(reached, span.stop)
        _add(self.missing, reached, end)


def _add(spans: list[range], start: int, stop: int) -> None:
    if start < stop:
        spans.append(range(start, stop))


def _without(spans: Sequence[range], others: Iterable[range]) -> list[range]:
    """Those of `spans`, which are one index long each, that are in none of `others`."""
    within = _Cover(others, 0).all
    starts = [span.start for span in within]

    def is_within(index: int) -> bool:
        at = bisect(starts, index) - 1
        return at >= 0 and index in within[at]

    return [span for span in spans if not is_within(span.start)]


def _shorten(spans: Sequence[range], most: int = 10) -> str:
    """`3, 5, 8 and 20 more`."""
    count = sum(len(span) for span in spans)
    shown = ", ".join(map(str, islice(chain.from_iterable(spans), most)))
    return shown if count <= most else f"{shown} and {count - most} more"


def _sums(run: DescribedRun) -> Iterator[Fault]:
    """What metadata.json adds up from the entries of the shards."""
    said, sums = run.metadata["totals"], run.ledger.totals()
    for name in [name for name in {**said, **sums} if said.get(name) != sums.get(name)]:
        what = f"totals: {name} is {said.get(name)}, its shards and notes come to {sums.get(name)}"
        yield Fault(f"{run.where}/{METADATA_NAME}", what)


def _statistics(run: DescribedRun) -> Iterator[Fault]:
    """stats.safetensors is the sum of the shards' statistics, and metadata.json shows its summary."""
    if run.ledger.status != COMPLETED or not run.shards:
        return
    where, data = f"{run.where}/{STATS_NAME}", run.files.read(STATS_NAME)
    again = f"`python -m qwen_jax stats {run.where} --output {STATS_NAME}` makes it again"
    if data is None:
        yield Fault(where, f"is missing; {again}")
        return
    try:
        whole = parse_stats(data, where)
        parts, merged = 0, None
        for part in _shards_stats(run):
            parts, merged = parts + 1, part if merged is None else merge_stats([merged, part])
        if merged is not None and parts == len(run.shards) and stats_bytes(merged) != data:
            yield Fault(where, f"is not the sum of the shards' statistics; {again}")
    except BadDataError as error:
        yield Fault(where, str(error))
        return
    summary = {kind: stats.summary() for kind, stats in whole.items()}
    if run.ledger.statistics != summary:
        yield Fault(f"{run.where}/{METADATA_NAME}", f"statistics are not those of {STATS_NAME}")


def _shards_stats(run: Run) -> Iterator[Stats]:
    """The statistics files of the shards that are there and whole; ShardFaults names the others."""
    for name in run.shards:
        stats_name = stats_name_beside(name)
        data = run.files.read(stats_name)
        if data is not None:
            with suppress(BadDataError):
                yield parse_stats(data, stats_name)


def _unlike_workers(runs: Sequence[DescribedRun]) -> Iterator[Fault]:
    """What must be the same in all workers of one dataset, and what no two may have."""
    whole = [run for run in runs if not run.is_part]
    for run, other in combinations(whole, 2):
        if run.worker_id == other.worker_id:
            yield Fault(other.where, f"is worker {other.worker_id}, as {run.where} is")
        if _shared_layers(run, other) and _stream(run) == _stream(other):
            yield Fault(other.where, f"holds the samples of a stream that {run.where} holds too")
    for run in whole[1:]:
        ours, first = run.metadata["fingerprint"], whole[0].metadata["fingerprint"]
        fields = [field for field in {**first, **ours} if field not in _MAY_DIFFER]
        if _shared_layers(run, whole[0]):
            fields.append("layers")
        for field in fields:
            if first.get(field) != ours.get(field):
                yield Fault(
                    run.where, f"has {field} {ours.get(field)!r}, {whole[0].where} has {first.get(field)!r}"
                )


def _shared_layers(run: DescribedRun, other: DescribedRun) -> bool:
    """Whether both store some layer's rows of one kind."""
    kinds = set(run.kinds) & set(other.kinds)
    return bool(kinds) and not set(run.metadata["layers"]).isdisjoint(other.metadata["layers"])


def _stream(run: DescribedRun) -> Any:
    return run.metadata["fingerprint"]["stream_sha256"]


def _against_streams(runs: Sequence[DescribedRun], path: str | Path) -> Iterator[Fault]:
    try:
        streams = parse(read_any(path), STREAMS)["streams"]
    except DamagedError as error:
        raise BadDataError(
            f"{path} is not a streams.json ({error}); give the one beside the streams"
        ) from error
    expected = {entry["sha256"]: (entry["file"], entry["samples"]) for entry in streams}
    for sha256, (file, samples) in expected.items():
        yield from _stream_file(path, file, sha256, samples)
        having = [run for run in runs if _stream(run) == sha256]
        if not having:
            yield Fault(str(path), f"no worker has extracted {file}")
        for run in having:
            if run.metadata["dataset"]["lines"] != samples:
                lines = run.metadata["dataset"]["lines"]
                yield Fault(run.where, f"saw {lines} lines of {file}, which has {samples}")
            if run.ledger.next_sample_idx != samples:
                done = run.ledger.next_sample_idx
                yield Fault(run.where, f"dealt with {done} of the {samples} samples of {file}")
    for run in runs:
        if _stream(run) not in expected:
            yield Fault(run.where, f"its stream is none of {path}")


def _stream_file(path: str | Path, file: str, sha256: str, samples: int) -> Iterator[Fault]:
    """Where the stream still lies beside its streams.json: whether it is what was extracted."""
    stream = Path(plain(path)).parent / Path(file).name
    if is_bucket_url(path) or not stream.is_file():
        return
    found = stream_summary(stream)
    if (found.sha256, found.lines) != (sha256, samples):
        yield Fault(
            str(stream),
            f"was changed since it was made: it has {found.lines} lines and sha256 {found.sha256}, not {samples} and "
            f"{sha256}",
        )
