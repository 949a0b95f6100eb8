"""What a shard is, how it is written, and how a stranger's is read."""

from qwen_jax.shards.format import (
    EMBEDDING,
    OPTIONAL_KEYS,
    RECORD_KEYS,
    Sample,
    ShardError,
    ShardInfo,
    check_index,
    load_shard,
    record_keys,
    shard_layers,
    write_shard,
)
from qwen_jax.shards.rows import KIND_KEYS, QuantisedRows, Rows, restore, stored_bytes

__all__ = [
    "EMBEDDING",
    "KIND_KEYS",
    "OPTIONAL_KEYS",
    "RECORD_KEYS",
    "QuantisedRows",
    "Rows",
    "Sample",
    "ShardError",
    "ShardInfo",
    "check_index",
    "load_shard",
    "record_keys",
    "restore",
    "shard_layers",
    "stored_bytes",
    "write_shard",
]
