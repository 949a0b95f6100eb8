"""Where a start picks up: what the checkpoint and metadata say, believed only as far as shards exist.

Never a silent restart from sample 0: whatever is missing, torn or foreign is either rebuilt from the
shards, with a warning, or refused.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from qwen_jax.errors import ConfigError, WriterConflictError
from qwen_jax.files import storage_errors
from qwen_jax.ledger.checkpoint import CheckpointRecord, parse_checkpoint
from qwen_jax.ledger.checks import DamagedError
from qwen_jax.ledger.metadata import Ledger, RunIdentity, ShardEntry, StoredMetadata, parse_metadata
from qwen_jax.ledger.names import METADATA_NAME, SHARD_PREFIX, STATS_PREFIX, shard_name, shard_stats_name
from qwen_jax.ledger.schema import COMPLETED
from qwen_jax.run.background import Publisher
from qwen_jax.run.commit import Committer, Fence
from qwen_jax.run.failpoints import failpoint
from qwen_jax.run.fingerprint import check_fingerprint
from qwen_jax.run.places import Places
from qwen_jax.run.shutdown import raise_if
from qwen_jax.storage.atomic import sync_folder
from qwen_jax.storage.checksum import file_crc32c
from qwen_jax.storage.store import ObjectInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """ledger: what is durable; kept: that and the further shards that only lie locally.

    bucket_lags, local_lags: the markers there do not say what is durable, and no adoption will write them.
    stored: what the bucket's metadata.json says, or may say until all of `ledger` is in place; None without one.
    settings, written_by: those of the run before (job.identify), {} for a new run.
    """

    ledger: Ledger
    kept: Ledger
    fence: Fence
    is_new: bool
    stored: Ledger | None
    bucket_lags: bool
    local_lags: bool
    settings: dict[str, Any]
    written_by: dict[str, str | int]

    @property
    def adopts(self) -> bool:
        return len(self.kept.shards) > len(self.ledger.shards)


@dataclass(frozen=True)
class _Claim:
    """What one place says about the run; None where it says nothing readable."""

    place: str
    checkpoint: CheckpointRecord | None
    metadata: StoredMetadata | None
    problems: tuple[str, ...]

    @property
    def ledger(self) -> Ledger | None:
        return self.metadata.ledger if self.metadata is not None else None

    @property
    def says_nothing(self) -> bool:
        return self.checkpoint is None and self.ledger is None

    @property
    def covered(self) -> int:
        """Shards that were durable when this was written."""
        listed = len(self.ledger.shards) if self.ledger is not None else 0
        return max(listed, self.checkpoint.total_shards if self.checkpoint is not None else 0)

    def agrees(self, ledger: Ledger, *, checkpointing: bool) -> bool:
        """Whether the markers say exactly `ledger`."""
        wanted = (len(ledger.shards), ledger.last_processed_sample_idx, ledger.status)
        found = self.checkpoint and (
            self.checkpoint.total_shards,
            self.checkpoint.last_processed_sample_idx,
            self.checkpoint.status,
        )
        return self.ledger == ledger and (not checkpointing or found == wanted)


def take_up(
    run: RunIdentity,
    places: Places,
    layers: Sequence[int],
    *,
    force_restart: bool = False,
    delete_local_after_upload: bool = False,
    stop: Event | None = None,
) -> tuple[Committer, Resumed]:
    """Finds where to go on, and brings the places to one state; raises what `resume` and `discard` do.

    stop: set from another thread, it ends the storing of kept shards by TerminatedError; it is set where one of them
    cannot be stored, so that nothing else is tried again.
    """
    if force_restart:
        discard(run, places)
    resumed = resume(run, places)
    if force_restart and not resumed.ledger.shards:
        resumed = replace(resumed, is_new=True)
    committer = Committer(
        run,
        places,
        layers,
        resumed.ledger,
        resumed.fence,
        delete_local_after_upload=delete_local_after_upload,
    )
    failpoint("resumed")
    if resumed.is_new:
        committer.open()
    elif resumed.adopts:
        committer.claim()
    elif resumed.bucket_lags or resumed.local_lags:
        committer.mend(resumed.stored if resumed.bucket_lags else None)
    if resumed.adopts:
        _adopt(committer, resumed.kept, stop or Event())
    if committer.ledger.status != COMPLETED:
        committer.delete_uploaded()
    return committer, resumed


def _adopt(committer: Committer, kept: Ledger, stop: Event) -> None:
    """Stores the shards of `kept` that are not durable: an earlier run left them whole on the local disk."""
    durable = len(committer.ledger.shards)
    committer.take_over(kept)
    with Publisher(committer, stop) as publisher:
        for shards in range(durable + 1, len(kept.shards) + 1):
            raise_if(stop)
            publisher.add(partial(_upto, kept, shards))
        publisher.wait()


def _upto(kept: Ledger, shards: int) -> Ledger:
    log.info("uploading %s, kept by an earlier run", shard_name(shards))
    failpoint("adopting")
    return kept.prefix(shards)


def resume(run: RunIdentity, places: Places) -> Resumed:
    """Finds the longest prefix of the run that is durable.

    Raises ConfigError (78) if what is stored belongs to a run with other settings, or cannot be trusted:
    shards without metadata, a damaged checkpoint with nothing to rebuild it from, a shard that the
    checkpoint covers but that is missing or changed.
    """
    fence = Fence()
    claims = [_local_claim(run, places)]
    if places.store is not None:
        claims.insert(0, _bucket_claim(run, places, fence))
    for claim in claims:
        for problem in claim.problems:
            log.warning("%s: %s", claim.place, problem)
    _refuse_unexplained(places, claims, fence)
    _refuse_without_bucket(places, claims)
    ledgers = [claim.ledger for claim in claims if claim.ledger is not None]
    if places.store is None:
        is_durable = _local_check(places)
    else:
        is_durable = _bucket_check(places)
        # What no marker in the bucket covers is not durable, even where it lies there as described: a rival
        # may be about to replace it, and not know that anybody counts on it. Adopting it stores it anew.
        ledgers = [ledger.prefix(min(claims[0].covered, len(ledger.shards))) for ledger in ledgers]
    ledger = max((_verified(ledger, is_durable) for ledger in ledgers), key=_reach, default=Ledger())
    kept = _kept(ledger, claims[-1].ledger, places) if places.store is not None else ledger
    _refuse_lost(claims, len(kept.shards), places, fence)
    is_new = all(claim.says_nothing for claim in claims)
    if not is_new and claims[0].checkpoint is None and places.checkpoint_path is not None:
        log.warning("checkpoint of worker %d rebuilt from %d shards", run.worker_id, len(ledger.shards))
    lags = [
        kept == ledger and not claim.agrees(ledger, checkpointing=places.checkpoint_path is not None)
        for claim in claims
    ]
    before = next((claim.metadata for claim in claims if claim.metadata is not None), None)
    settings, writer = (before.settings, before.written_by) if before is not None else ({}, {})
    in_bucket = places.store is not None
    stored = (claims[0].ledger or ledger.reopened(len(ledger.shards))) if in_bucket else None
    return Resumed(ledger, kept, fence, is_new, stored, in_bucket and lags[0], lags[-1], settings, writer)


def _refuse_lost(claims: list[_Claim], found: int, places: Places, fence: Fence) -> None:
    """What the first place that says anything covers must still be there."""
    truth = next((claim for claim in claims if not claim.says_nothing), None)
    if truth is not None and found < truth.covered:
        _refuse_a_moving_bucket(places, fence)
        raise ConfigError(
            f"{truth.place} should hold {truth.covered} shards, but {shard_name(found + 1)} is missing, "
            "changed or not described in metadata.json; restore it, or pass --force_restart to start over"
        )


def _refuse_a_moving_bucket(places: Places, fence: Fence) -> None:
    """What was read says nothing where another writer is at work while this one looks."""
    for name, generation in fence.generations.items():
        present = places.bucket.stat(name)
        if (present.generation if present else 0) != generation:
            raise WriterConflictError(
                f"{name} in {places.bucket.url} was changed by another writer while it was read; stop one of the two "
                "and start again"
            )


def _reach(ledger: Ledger) -> tuple[int, int, bool]:
    return len(ledger.shards), ledger.last_processed_sample_idx, ledger.status == COMPLETED


def _local_claim(run: RunIdentity, places: Places) -> _Claim:
    checkpoint = _read_local(places.checkpoint_path) if places.checkpoint_path else None
    return _claim(run, str(places.output_dir), checkpoint, _read_local(places.metadata_path))


def _read_local(path: Path) -> bytes | None:
    with storage_errors("read", path):
        return path.read_bytes() if path.exists() else None


def _bucket_claim(run: RunIdentity, places: Places, fence: Fence) -> _Claim:
    """Reads the bucket's markers and remembers their generations: the fencing token of this writer.

    As they were at one moment: a checkpoint from before a rival's --force_restart and metadata.json from after it would
    together cover shards that he is about to delete.
    """
    contents: dict[str, bytes | None] = {}
    for name in (places.checkpoint_name, METADATA_NAME):
        stored = places.bucket.get_bytes(name)
        contents[name] = stored[0] if stored else None
        fence.generations[name] = stored[1].generation if stored else 0
    _refuse_a_moving_bucket(places, fence)
    checkpoint = contents[places.checkpoint_name] if places.checkpoint_path else None
    return _claim(run, places.bucket.url, checkpoint, contents[METADATA_NAME])


def _claim(run: RunIdentity, place: str, checkpoint: bytes | None, metadata: bytes | None) -> _Claim:
    problems = []
    record = stored = None
    if checkpoint is not None:
        try:
            record = parse_checkpoint(checkpoint)
        except DamagedError as error:
            problems.append(f"the checkpoint is damaged ({error})")
        else:
            _refuse_foreign(run, record.worker_id, record.fingerprint, f"the checkpoint of {place}")
    if metadata is not None:
        try:
            stored = parse_metadata(metadata, f"metadata.json of {place}")
        except DamagedError as error:
            problems.append(f"metadata.json is damaged ({error})")
        else:
            _refuse_foreign(run, stored.worker_id, stored.fingerprint, f"metadata.json of {place}")
    return _Claim(place, record, stored, tuple(problems))


def _refuse_foreign(run: RunIdentity, worker_id: int, fingerprint: dict, source: str) -> None:
    check_fingerprint(
        {"worker_id": worker_id, **fingerprint}, {"worker_id": run.worker_id, **run.fingerprint}, source
    )


def _refuse_unexplained(places: Places, claims: list[_Claim], fence: Fence) -> None:
    """A first run marks its folder before its first shard, so shards without metadata are not ours."""
    if any(claim.ledger is not None for claim in claims):
        return
    found = places.local_shard_names()
    if places.store is not None:
        found += [info.name for info in places.store.list(SHARD_PREFIX)]
    damaged = any(claim.problems for claim in claims) or any(claim.checkpoint for claim in claims)
    if found or damaged:
        _refuse_a_moving_bucket(places, fence)
        what = f"{len(found)} shards ({found[0]} ...)" if found else "a checkpoint"
        raise ConfigError(
            f"{places} holds {what} but no readable metadata.json, so the run cannot be resumed; choose "
            "another --output_dir, restore metadata.json, or pass --force_restart to overwrite it all"
        )


def _refuse_without_bucket(places: Places, claims: list[_Claim]) -> None:
    """Another machine may have gone on in the bucket that the run uploads to."""
    bucket = next((claim.metadata.uploaded_to for claim in claims if claim.metadata is not None), None)
    if places.store is None and bucket is not None:
        raise ConfigError(
            f"{places} holds a run that uploads to {bucket}, where another machine may have gone on; pass "
            "--upload_to_gcs and --gcs_bucket, another --output_dir and --checkpoint_dir for a new run, or "
            "--force_restart to overwrite what is here"
        )


ShardCheck = Callable[[list[ShardEntry]], list[bool]]


def _bucket_check(places: Places) -> ShardCheck:
    def check(entries: list[ShardEntry]) -> list[bool]:
        present = {info.name: (info.size, info.crc32c) for info in places.bucket.list(SHARD_PREFIX)}
        return [present.get(entry.filename) == (entry.bytes, entry.crc32c) for entry in entries]

    return check


def _local_check(places: Places) -> ShardCheck:
    def is_whole(entry: ShardEntry) -> bool:
        path = places.output_dir / entry.filename
        try:
            return path.stat().st_size == entry.bytes and file_crc32c(path) == (entry.bytes, entry.crc32c)
        except FileNotFoundError:
            return False

    def check(entries: list[ShardEntry]) -> list[bool]:
        if entries:
            log.info("checking %d shards in %s", len(entries), places.output_dir)
        with ThreadPoolExecutor() as pool:
            return list(pool.map(is_whole, entries))

    return check


def _verified(ledger: Ledger, is_durable: ShardCheck) -> Ledger:
    """The longest prefix of `ledger` whose shards all exist as described."""
    return ledger.prefix(_first(is_durable(list(ledger.shards))))


def _first(checks: Iterable[bool]) -> int:
    """How many are true before one is not."""
    return [*checks, False].index(False)


def _kept(durable: Ledger, local: Ledger | None, places: Places) -> Ledger:
    """The bucket's ledger, and the local one's further shards as far as they are whole and have their statistics:
    those that lie in the bucket may be about to be deleted.

    No further ones if the two took different ways: another machine's bits may differ in the last place.
    """
    if local is None or durable.status == COMPLETED or local.shards[: len(durable.shards)] != durable.shards:
        return durable
    further = list(local.shards[len(durable.shards) :])
    described = set(places.local_stats_names())
    whole = enumerate(_local_check(places)(further), len(durable.shards) + 1)
    kept = _first(each and shard_stats_name(number) in described for number, each in whole)
    return local.prefix(len(durable.shards) + kept) if kept else durable


def discard(run: RunIdentity, places: Places) -> None:
    """Deletes what an earlier run left in both places (`--force_restart`).

    The bucket's markers are not deleted: they are replaced by those of an empty run, and only then the rest goes.
    So whoever was at work here is fenced out first, and whoever comes after finds a run to go on with. Only what
    was there before that, under the generation that it had then, is deleted.

    Raises WriterConflictError where another writer is at work.
    """
    stored = list(places.store.list()) if places.store is not None else []
    markers = {info.name: info.generation for info in stored if info.name in _marker_names(places)}
    data = [info for info in stored if info.name.startswith((SHARD_PREFIX, STATS_PREFIX))]
    local_data = [
        places.output_dir / name for name in (*places.local_shard_names(), *places.local_stats_names())
    ]
    local_markers = [
        path for path in (places.checkpoint_path, places.metadata_path) if path and path.exists()
    ]
    _name_what_goes([*local_markers, *local_data], [*markers, *(info.name for info in data)], places)
    _delete_local(local_markers, places)
    if markers or data:
        _empty_bucket(run, places, markers, data)
    _delete_local(local_data, places)


def _marker_names(places: Places) -> tuple[str, str]:
    return places.checkpoint_name, METADATA_NAME


def _name_what_goes(local: list[Path], stored: list[str], places: Places) -> None:
    names = [*map(str, local), *(f"{places.bucket.url}/{name}" for name in stored)]
    if names:
        shown = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
        log.warning("--force_restart: deleting %d files: %s", len(names), shown)


def _empty_bucket(run: RunIdentity, places: Places, markers: dict[str, int], data: list[ObjectInfo]) -> None:
    """markers, data: as listed. The checkpoint first: dying after it, the old run is still whole."""
    fence = Fence({name: markers.get(name, 0) for name in _marker_names(places)})
    Committer(run, places, (), Ledger(), fence).start_over()
    for info in data:
        places.bucket.delete(info.name, info.generation)


def _delete_local(paths: list[Path], places: Places) -> None:
    """Deletes files so that they stay deleted when the power fails, those too that a start before this one deleted, and
    died: else its marker comes back to data that is gone."""
    for path in paths:
        with storage_errors("delete", path):
            path.unlink()
    for folder in {places.output_dir, *([places.checkpoint_path.parent] if places.checkpoint_path else [])}:
        with storage_errors("delete in", folder):
            sync_folder(folder)
