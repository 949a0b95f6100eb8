"""The commit protocol: data first, then the marker, bucket before local (docs/reliability.md).

One commit is: the shard under its final name on the local disk, the local metadata.json, the shard in the
bucket, metadata.json in the bucket, the checkpoint in the bucket, the local checkpoint. Whatever dies
between two steps, no marker is ever ahead of durable data.
"""

import logging
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from qwen_jax.data.prompts import SkippedSample, TokenizedSample
from qwen_jax.errors import WriterConflictError
from qwen_jax.run.failpoints import HalfWritten, failpoint
from qwen_jax.run.ledger import METADATA_NAME, Ledger, RunIdentity, ShardEntry, shard_name
from qwen_jax.run.pipeline import CapturedSample, FilledShard
from qwen_jax.run.places import Places
from qwen_jax.shards import write_shard
from qwen_jax.shards.statistics import layer_norms
from qwen_jax.storage.local import atomic_write, json_bytes, storage_errors, write_json
from qwen_jax.storage.store import PreconditionFailedError

log = logging.getLogger(__name__)


@dataclass
class Fence:
    """Generations of the bucket's marker objects as this writer knows them; 0 means absent.

    Each write is conditional on them, so that of two workers with one id the second to write finds out.
    writer: tells our own write whose reply was lost from a rival's write of the same bytes.
    """

    generations: dict[str, int] = field(default_factory=dict)
    writer: str = field(default_factory=lambda: secrets.token_hex(8))


class Committer:
    """Makes shards durable, in order, one at a time."""

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

    def open(self) -> None:
        """Marks a new run's folder and bucket as its own, before any shard is there."""
        self._commit_markers(self.ledger)
        failpoint("opened")

    def mend(self, *, bucket: bool) -> None:
        """Writes the markers again where they lag behind what is durable; the bucket's only if asked to."""
        self._commit_markers(self.ledger, bucket=bucket)

    def add(self, shard: FilledShard) -> None:
        """Writes, uploads and records one shard."""
        entry = self._write(shard.samples)
        tokenized = [sample.tokenized for sample in shard.samples]
        ledger = self.ledger.with_shard(entry, map(_skip_note, shard.skipped), *_shortening_notes(tokenized))
        self._commit(ledger, entry)
        log.info(
            "%s: samples %d to %d, %d tokens, %.1f MB",
            entry.filename,
            entry.first_sample_idx,
            entry.last_sample_idx,
            entry.tokens,
            entry.bytes / 1e6,
        )

    def adopt(self, ledger: Ledger) -> None:
        """Uploads a shard that an earlier run left whole on the local disk; `ledger` already holds it."""
        log.info("uploading %s, kept by an earlier run", ledger.shards[-1].filename)
        failpoint("adopting")
        self._commit(ledger, ledger.shards[-1])
        failpoint("adopted")

    def complete(self, lines: int, skipped: Iterable[SkippedSample]) -> None:
        """Marks the run as completed at the end of the stream."""
        failpoint("completing")
        self._commit_markers(self.ledger.completed(lines, map(_skip_note, skipped)))

    def _write(self, samples: Sequence[CapturedSample]) -> ShardEntry:
        name = shard_name(len(self.ledger.shards) + 1)
        with atomic_write(self._places.output_dir / name) as file:
            info = write_shard(HalfWritten(file), self._layers, [sample.for_shard() for sample in samples])
            failpoint("shard_written")
        failpoint("shard_named")
        norms = layer_norms(self._layers, [sample.norms_CT for sample in samples])
        return ShardEntry(filename=name, bytes=file.size, crc32c=file.crc32c, layer_norms=norms, **vars(info))

    def _commit(self, ledger: Ledger, entry: ShardEntry) -> None:
        if self._places.store is not None:
            # The local metadata comes before the upload: should the upload fail for good, the next start
            # finds the kept shard described there and uploads it first.
            write_json(self._places.metadata_path, ledger.metadata(self._run))
            failpoint("shard_described")
            self._upload(entry)
            failpoint("shard_uploaded")
        self._commit_markers(ledger)
        if self._delete_local:
            path = self._places.output_dir / entry.filename
            with storage_errors("delete", path):
                path.unlink(missing_ok=True)

    def _upload(self, entry: ShardEntry) -> None:
        path = self._places.output_dir / entry.filename
        store = self._places.store
        try:
            store.put_file(entry.filename, path, if_generation=0)
        except PreconditionFailedError as refused:
            # No checkpoint covers it, so it is a dead predecessor's; unless a live rival has just stored it.
            # Writing the markers again fails if the rival has committed it, and keeps him from doing so.
            self._store_markers(self.ledger)
            log.warning("%s stands in the bucket but no checkpoint covers it; replacing it", entry.filename)
            store.put_file(entry.filename, path, if_generation=refused.present.generation)

    def _commit_markers(self, ledger: Ledger, *, bucket: bool = True) -> None:
        write_json(self._places.metadata_path, ledger.metadata(self._run))
        failpoint("metadata_local")
        if bucket and self._places.store is not None:
            self._store_markers(ledger)
        if self._places.checkpoint_path is not None:
            write_json(self._places.checkpoint_path, ledger.checkpoint(self._run))
        failpoint("checkpoint_local")
        self.ledger = ledger

    def _store_markers(self, ledger: Ledger) -> None:
        self._put_marker(METADATA_NAME, json_bytes(ledger.metadata(self._run)))
        failpoint("metadata_stored")
        if self._places.checkpoint_path is not None:
            self._put_marker(self._places.checkpoint_name, json_bytes(ledger.checkpoint(self._run)))
        failpoint("checkpoint_stored")

    def _put_marker(self, name: str, data: bytes) -> None:
        known = self._fence.generations.get(name, 0)
        try:
            info = self._places.store.put_bytes(name, data, if_generation=known, writer=self._fence.writer)
        except PreconditionFailedError as refused:
            raise WriterConflictError(
                f"{name} in {self._places.store.url} was changed by another writer with worker id "
                f"{self._run.worker_id}; stop one of the two and start again"
            ) from refused
        self._fence.generations[name] = info.generation


class BackgroundCommitter:
    """Runs a Committer's work on one thread beside the device, at most one shard ahead.

    A failure is raised by the next call; leaving the `with` block by an exception abandons what waits.
    """

    def __init__(self, committer: Committer):
        self._committer = committer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: Future | None = None

    def add(self, shard: FilledShard) -> None:
        """Waits for the shard before, then starts on this one."""
        self.wait()
        self._running = self._pool.submit(self._committer.add, shard)

    def wait(self) -> None:
        """Returns when all that was added is durable; raises what went wrong."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    @property
    def backlog(self) -> int:
        """Shards being compressed, written or uploaded now."""
        return int(self._running is not None and not self._running.done())

    def __enter__(self) -> "BackgroundCommitter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _skip_note(sample: SkippedSample) -> dict:
    return {
        "sample_idx": sample.sample_idx,
        "line": sample.sample_idx + 1,
        "task_id": sample.task_id,
        "reason": sample.reason,
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
