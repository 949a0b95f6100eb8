"""The statistics of a run's durable shards, wherever their files are."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwen_jax.run.places import Places
from qwen_jax.shards import load_shard
from qwen_jax.shards.ledger import ShardEntry
from qwen_jax.shards.statistics import Stats, first_whole, merge_stats, shard_stats, shard_stats_name

log = logging.getLogger(__name__)


class StoredStats:
    """Finds each shard's statistics: the local file, else the bucket's, else anew from the shard itself."""

    def __init__(self, places: Places, kinds: Sequence[str]):
        """kinds: what is stored, the main kind first, without the embedding."""
        self._places = places
        self._kinds = kinds

    def merged(self, shards: Sequence[ShardEntry]) -> Stats:
        """Over all of `shards`, at least one, in order."""
        return merge_stats([self._of_shard(number, shard) for number, shard in enumerate(shards, 1)])

    def _of_shard(self, number: int, shard: ShardEntry) -> Stats:
        stats = first_whole(self._copies(shard_stats_name(number)), shard.tokens)
        if stats is not None:
            return stats
        log.warning("%s has no statistics; computing them from the shard", shard.filename)
        return self._recomputed(shard)

    def _copies(self, name: str) -> Iterator[tuple[bytes, str]]:
        path = self._places.output_dir / name
        if path.exists():
            yield path.read_bytes(), str(path)
        stored = self._places.store.get_bytes(name) if self._places.store is not None else None
        if stored is not None:
            yield stored[0], f"{self._places.store.url}/{name}"

    def _recomputed(self, shard: ShardEntry) -> Stats:
        path = self._places.output_dir / shard.filename
        if path.exists():
            return shard_stats(load_shard(path), self._kinds)
        with tempfile.TemporaryDirectory(dir=self._places.output_dir) as folder:
            copy = Path(folder) / shard.filename
            self._places.store.download_file(shard.filename, copy)
            return shard_stats(load_shard(copy), self._kinds)
