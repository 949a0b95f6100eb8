"""The commit protocol: data first, then the marker, bucket before local (docs/reliability.md).

One commit is: no other shard of that name on the local disk, the shard's statistics and the shard under their final
names there, the local metadata.json, statistics and shard in the bucket, metadata.json in the bucket, the checkpoint in
the bucket, the local checkpoint. Whatever dies between two steps, no marker is ever ahead of durable data.

Several shards go to the bucket at once, each over a connection of its own (background.py); all else is done in their
order.
"""

import logging
import secrets
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_jax.data.prompts import SkippedSample, TokenizedSample
from qwen_jax.errors import WriterConflictError
from qwen_jax.files import storage_errors
from qwen_jax.ledger.metadata import Ledger, RunIdentity, ShardEntry
from qwen_jax.ledger.names import METADATA_NAME, STATS_NAME, shard_name, shard_stats_name
from qwen_jax.ledger.schema import COMPLETED
from qwen_jax.run.failpoints import failpoint, through_failpoint
from qwen_jax.run.pipeline import FilledShard
from qwen_jax.run.places import Places
from qwen_jax.run.run_stats import StoredStats
from qwen_jax.run.stages import timed
from qwen_jax.shards import ShardInfo, write_shard
from qwen_jax.shards.statistics import Stats, stats_bytes
from qwen_jax.storage.atomic import AtomicFile, atomic_write, json_bytes, sync_folder, write_json
from qwen_jax.storage.store import PreconditionFailedError

log = logging.getLogger(__name__)


@dataclass
class Fence:
    """Generations of the bucket's marker objects as this writer knows them; 0 means absent.

    Each write is conditional on them, so that of two workers with one id the second to write finds out.
    writer: goes with everything that this writer stores. It tells our own write whose reply was lost from
    another's write of the same bytes.
    """

    generations: dict[str, int] = field(default_factory=dict)
    writer: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True)
class WrittenShard:
    """A shard in its temporary file, and what the ledger will say of it."""

    file: AtomicFile
    info: ShardInfo
    stats: Stats
    skipped: list[dict]
    truncated: list[dict]
    shortened: list[dict]


class Committer:
    """Makes shards durable: `write`, `name`, `upload` and `commit` for each.

    Shards are written, named and committed in order, never two at a time; they are uploaded in any order, in any number
    of threads.
    """

    def __init__(
        self,
        run: RunIdentity,
        places: Places,
        layers: Sequence[int],
        ledger: Ledger,
        fence: Fence,
        *,
        delete_local_after_upload: bool = False,
    ):
        self.ledger = ledger
        self._run = run
        self._places = places
        self._layers = layers
        self._fence = fence
        self._delete_local = delete_local_after_upload and places.store is not None
        self._shards_begun = len(ledger.shards)
        self._listed = ledger
        """What the local metadata.json says: `ledger`, and shards on their way to the bucket."""
        self._uploaded: dict[int, Ledger] = {}
        """By how many shards it has: each whose last one is uploaded and waits for one before it."""
        self._listing = threading.Lock()
        self._marking = threading.Lock()
        self._marking_failed: BaseException | None = None

    def open(self) -> None:
        """Marks a new run's folder and bucket as its own, before any shard is there."""
        self._commit_markers(self.ledger)
        failpoint("opened")

    def describe(self, **header: Any) -> None:
        """Puts entries of the header of metadata.json in the place of others, from the next commit on."""
        self._run = replace(self._run, header={**self._run.header, **header})

    def start_over(self) -> None:
        """Puts the markers of an empty run in the place of those in the bucket, the checkpoint first."""
        if self._places.checkpoint_path is not None:
            self._put_marker(self._places.checkpoint_name, json_bytes(self.ledger.checkpoint(self._run)))
        self._put_marker(METADATA_NAME, json_bytes(self.ledger.metadata(self._run)))

    def claim(self) -> None:
        """Marks a bucket that has no metadata.json as this writer's, before a kept shard is uploaded."""
        if not self._fence.generations.get(METADATA_NAME):
            self._store_markers(self.ledger)

    def mend(self, stored: Ledger | None) -> None:
        """Writes the markers again where they lag behind what is durable.

        stored: what the bucket's metadata.json says; None where the bucket's markers are not to be written.
        """
        ledger = self.ledger
        if ledger.status == COMPLETED:
            behind = stored if stored is not None and stored.status != COMPLETED else None
            if behind is not None:
                self.ledger = behind  # until the statistics are there, no marker may say that all is done
            self._commit_stats(ledger, upload=behind is not None)
        self._commit_markers(ledger, bucket=stored is not None)

    def take_over(self, ledger: Ledger) -> None:
        """Lists what further shards of `ledger` an earlier run left whole on the local disk: they are uploaded and
        committed next."""
        self._list(ledger)
        self._shards_begun = len(ledger.shards)

    def delete_uploaded(self) -> None:
        """Deletes the local shards that the bucket has, where that is asked for: a start that dies may leave some."""
        present = set(self._places.local_shard_names()) if self._delete_local else set()
        uploaded = [entry for entry in self.ledger.shards if entry.filename in present]
        if uploaded:
            log.info("deleting %d shards here that are in the bucket", len(uploaded))
        for entry in uploaded:
            self._delete(entry)

    def _delete(self, entry: ShardEntry) -> None:
        path = self._places.output_dir / entry.filename
        with storage_errors("delete", path):
            path.unlink(missing_ok=True)

    def write(self, shard: FilledShard) -> WrittenShard:
        """Compresses the next shard into its temporary file."""
        path = self._places.output_dir / shard_name(self._shards_begun + 1)
        file = AtomicFile(path)
        try:
            samples = [sample.for_shard() for sample in shard.samples]
            with timed(f"compressing {path.name}"):
                info = write_shard(through_failpoint(file), self._layers, samples)
            failpoint("shard_written")
        except BaseException:
            file.discard()
            raise
        self._shards_begun += 1
        stats = shard.stats(self._layers)
        truncated, shortened = _shortening_notes([sample.tokenized for sample in shard.samples])
        return WrittenShard(file, info, stats, list(map(_skip_note, shard.skipped)), truncated, shortened)

    def name(self, shard: WrittenShard) -> Ledger:
        """Gives a written shard its name on the local disk and lists it there; returns the ledger that ends with it."""
        try:
            _delete_stale(shard.file.path)
            self._write_stats(shard_stats_name(len(self._listed.shards) + 1), shard.stats)
        except BaseException:
            shard.file.discard()
            raise
        with timed(f"syncing {shard.file.path.name}"):
            shard.file.finish()
        failpoint("shard_named")
        entry = ShardEntry(
            filename=shard.file.path.name,
            bytes=shard.file.size,
            crc32c=shard.file.crc32c,
            **vars(shard.info),
        )
        ledger = self._listed.with_shard(entry, shard.skipped, shard.truncated, shard.shortened)
        # Before the upload: should that fail for good, the next start finds the kept shard described here and
        # uploads it first.
        self._list(ledger)
        failpoint("shard_described")
        return ledger

    def upload(self, ledger: Ledger) -> None:
        """Stores the ledger's last shard in the bucket, if there is one."""
        if self._places.store is None:
            return
        name, stats_name = ledger.shards[-1].filename, shard_stats_name(len(ledger.shards))
        with timed(f"uploading {name}"):
            # Before the shard, so that a shard that counts as durable has them.
            self._upload(stats_name)
            failpoint("stats_uploaded")
            self._upload(name)
        failpoint("shard_uploaded")
        self._uploaded[len(ledger.shards)] = ledger

    def commit(self, ledger: Ledger) -> None:
        """Records the ledger's last shard, which is uploaded, and those that have overtaken it; a second time it does
        nothing."""
        done = len(self.ledger.shards)
        self._uploaded.pop(len(ledger.shards), None)
        if len(ledger.shards) <= done:
            return
        while further := self._uploaded.pop(len(ledger.shards) + 1, None):
            ledger = further
        if ledger.status == COMPLETED:
            self._commit_stats(ledger)
        self._commit_markers(ledger)
        for entry in ledger.shards[done:]:
            self._committed(entry)
        if note := ledger.length_note(self._run.max_seq_length):
            log.info("%s", note)

    def _committed(self, entry: ShardEntry) -> None:
        if self._delete_local:
            self._delete(entry)
        log.info(
            "%s: samples %d to %d, %d tokens, %.1f MB",
            entry.filename,
            entry.first_sample_idx,
            entry.last_sample_idx,
            entry.tokens,
            entry.bytes / 1e6,
        )

    def complete(self, lines: int, skipped: Iterable[SkippedSample]) -> None:
        """Marks the run as completed at the end of the stream."""
        failpoint("completing")
        stats = self._commit_stats(self.ledger)
        summary = {kind: entry.summary() for kind, entry in stats.items()}
        self._commit_markers(self.ledger.completed(lines, map(_skip_note, skipped), summary))

    def _commit_stats(self, ledger: Ledger, *, upload: bool = True) -> Stats:
        """Makes the statistics of all shards durable, which a marker of a completed run stands for."""
        if not ledger.shards:
            return {}
        stats = StoredStats(self._places, self._run.kinds).merged(ledger.shards)
        self._write_stats(STATS_NAME, stats)
        if upload and self._places.store is not None:
            self._upload(STATS_NAME)
        return stats

    def _write_stats(self, name: str, stats: Stats) -> None:
        with atomic_write(self._places.output_dir / name) as file:
            file.write(stats_bytes(stats))

    def _upload(self, name: str) -> None:
        """Stores a local file as an object that this writer, and no other, has made.

        No marker covers what lies there under another's token: it is a dead predecessor's, or a rival's. Looked at
        first, then the markers are written again, then that very generation is replaced: in this order nobody
        can replace what another has committed (docs/reliability.md). Equal bytes are replaced too: a paused rival
        may be about to replace the generation that he has seen.
        """
        path, generation = self._places.output_dir / name, 0
        while True:
            try:
                self._places.bucket.put_file(name, path, if_generation=generation, writer=self._fence.writer)
                return
            except PreconditionFailedError as refused:
                # Gone again between the refusal and the look: then nothing may be there next time either.
                generation = refused.present.generation if refused.present else 0
            # Fails if a rival has committed it, and keeps him from doing so.
            with self._marking:
                self._mark(self.ledger)
            log.warning("%s stands in the bucket but no checkpoint covers it; replacing it", name)

    def _list(self, ledger: Ledger) -> None:
        """Writes the local metadata.json, in which no shard is forgotten that is on its way to the bucket."""
        with self._listing:
            if len(ledger.shards) >= len(self._listed.shards):
                write_json(self._places.metadata_path, ledger.metadata(self._run))
                self._listed = ledger

    def _commit_markers(self, ledger: Ledger, *, bucket: bool = True) -> None:
        self._list(ledger)
        failpoint("metadata_local")
        with self._marking:
            if bucket and self._places.store is not None:
                self._mark(ledger)
            self.ledger = ledger
        if self._places.checkpoint_path is not None:
            write_json(self._places.checkpoint_path, ledger.checkpoint(self._run))
        failpoint("checkpoint_local")

    def _mark(self, ledger: Ledger) -> None:
        """Writes the bucket's markers, unless that has failed before: then nobody knows what generations they have, and
        no other upload under way may take an old one for ours."""
        if self._marking_failed is not None:
            raise self._marking_failed
        try:
            self._store_markers(ledger)
        except BaseException as error:
            self._marking_failed = error
            raise

    def _store_markers(self, ledger: Ledger) -> None:
        self._put_marker(METADATA_NAME, json_bytes(ledger.metadata(self._run)))
        failpoint("metadata_stored")
        if self._places.checkpoint_path is not None:
            self._put_marker(self._places.checkpoint_name, json_bytes(ledger.checkpoint(self._run)))
        failpoint("checkpoint_stored")

    def _put_marker(self, name: str, data: bytes) -> None:
        known = self._fence.generations.get(name, 0)
        try:
            info = self._places.bucket.put_bytes(name, data, if_generation=known, writer=self._fence.writer)
        except PreconditionFailedError as refused:
            raise WriterConflictError(
                f"{name} in {self._places.bucket.url} was changed by another writer with worker id "
                f"{self._run.worker_id}; stop one of the two and start again"
            ) from refused
        self._fence.generations[name] = info.generation


def _delete_stale(path: Path) -> None:
    """Deletes a shard that an earlier start left under this name, and no ledger holds: of other bits, it would stand
    beside statistics that are not its own if this start died before it gave the new one its name."""
    if path.exists():
        with storage_errors("delete", path):
            path.unlink()
            sync_folder(path.parent)


def _skip_note(sample: SkippedSample) -> dict:
    return {
        "sample_idx": sample.sample_idx,
        "line": sample.sample_idx + 1,
        "task_id": sample.task_id,
        "reason": sample.reason.encode(errors="backslashreplace").decode(),
        "full_length": sample.full_length,
        "bad_record": sample.bad_record,
    }


def _shortening_notes(samples: Sequence[TokenizedSample]) -> tuple[list[dict], list[dict]]:
    """Notes on the samples that were cut on the right, and on those that lost leading examples."""

    def note(sample: TokenizedSample) -> dict:
        return {
            "sample_idx": sample.sample_idx,
            "task_id": sample.task_id,
            "full_length": sample.full_length,
            "kept_length": len(sample.token_ids),
            "dropped_examples": sample.dropped_examples,
        }

    truncated = [note(sample) for sample in samples if sample.truncated]
    shortened = [note(sample) for sample in samples if sample.dropped_examples]
    return truncated, shortened
