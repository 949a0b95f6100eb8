"""The two places a worker keeps things: its local folders, and the bucket if there is one."""

from dataclasses import dataclass
from pathlib import Path

from qwen_jax.files import storage_errors
from qwen_jax.ledger.names import METADATA_NAME, SHARD_PREFIX, SHARD_SUFFIX, STATS_PREFIX, STATS_SUFFIX
from qwen_jax.storage.atomic import TEMP_SUFFIX
from qwen_jax.storage.store import Store


@dataclass(frozen=True)
class Places:
    """output_dir: shards and metadata.json. checkpoint_path: None with --no_checkpointing. store: the bucket.

    The bucket, when there is one, is the truth, and every local file is a cache of it.
    """

    output_dir: Path
    checkpoint_path: Path | None
    checkpoint_name: str
    store: Store | None

    @property
    def bucket(self) -> Store:
        """The store, for what is done only where there is one."""
        assert self.store is not None
        return self.store

    @property
    def metadata_path(self) -> Path:
        return self.output_dir / METADATA_NAME

    def remove_leftovers(self) -> None:
        """Deletes the unfinished files of dead writers; raises StorageError."""
        for leftover in self.output_dir.glob(f"*{TEMP_SUFFIX}"):
            with storage_errors("delete", leftover):
                leftover.unlink()

    def local_shard_names(self) -> list[str]:
        return sorted(path.name for path in self.output_dir.glob(f"{SHARD_PREFIX}*{SHARD_SUFFIX}"))

    def local_stats_names(self) -> list[str]:
        return sorted(path.name for path in self.output_dir.glob(f"{STATS_PREFIX}*{STATS_SUFFIX}"))

    def __str__(self) -> str:
        return f"{self.store.url} and {self.output_dir}" if self.store else str(self.output_dir)
