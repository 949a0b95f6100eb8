"""The statistics of a run's durable shards, wherever their files are."""

import logging
from collections.abc import Iterator, Sequence

from qwen_jax.errors import WriterConflictError
from qwen_jax.files import storage_errors
from qwen_jax.ledger.metadata import ShardEntry
from qwen_jax.ledger.names import STATS_PREFIX, shard_stats_name
from qwen_jax.run.places import Places
from qwen_jax.shards import load_shard
from qwen_jax.shards.statistics import Stats, first_whole, merge_stats, shard_stats
from qwen_jax.storage.atomic import TEMP_SUFFIX
from qwen_jax.storage.checksum import crc32c_of, file_crc32c
from qwen_jax.storage.store import ObjectInfo

log = logging.getLogger(__name__)


class StoredStats:
    """Finds each shard's statistics: the local file, else the bucket's, else anew from the shard itself.

    A local file counts only as far as it is the bucket's, where there is one: it may stem from a shard of other bits
    that a rival's has overtaken.
    """

    def __init__(self, places: Places, kinds: Sequence[str]):
        """kinds: what is stored, the main kind first, without the embedding."""
        self._places = places
        self._kinds = kinds
        self._stored: dict[str, ObjectInfo] = {}

    def merged(self, shards: Sequence[ShardEntry]) -> Stats:
        """Over all of `shards`, at least one, in order."""
        if self._places.store is not None:
            self._stored = {info.name: info for info in self._places.store.list(STATS_PREFIX)}
        return merge_stats(self._of_shard(number, shard) for number, shard in enumerate(shards, 1))

    def _of_shard(self, number: int, shard: ShardEntry) -> Stats:
        stats = first_whole(self._copies(shard_stats_name(number)), shard.tokens)
        if stats is not None:
            return stats
        log.warning("%s has no statistics; computing them from the shard", shard.filename)
        return self._recomputed(shard)

    def _copies(self, name: str) -> Iterator[tuple[bytes, str]]:
        path, wanted = self._places.output_dir / name, self._stored.get(name)
        if path.exists():
            data = path.read_bytes()
            if wanted is None or (len(data), crc32c_of(data)) == (wanted.size, wanted.crc32c):
                yield data, str(path)
        if wanted is not None and (stored := self._places.bucket.get_bytes(name)) is not None:
            yield stored[0], f"{self._places.bucket.url}/{name}"

    def _recomputed(self, shard: ShardEntry) -> Stats:
        path = self._places.output_dir / shard.filename
        if path.exists() and file_crc32c(path) == (shard.bytes, shard.crc32c):
            return shard_stats(load_shard(path), self._kinds)
        copy = path.with_name(path.name + TEMP_SUFFIX)
        store = self._places.store
        found = None if store is None else store.download_file(shard.filename, copy)
        if found is None or (found.size, found.crc32c) != (shard.bytes, shard.crc32c):
            raise WriterConflictError(
                f"{shard.filename} was changed or deleted by somebody else while this worker was at work; start again"
            )
        try:
            return shard_stats(load_shard(copy), self._kinds)
        finally:
            with storage_errors("delete", copy):
                copy.unlink()
