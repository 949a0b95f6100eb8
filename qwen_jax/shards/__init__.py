"""What a shard is, how it is written, and how a stranger's is read."""

from qwen_jax.shards.format import (
    ACTIVATION_DTYPES,
    EMBEDDING,
    KIND_KEYS,
    OPTIONAL_KEYS,
    RECORD_KEYS,
    Rows,
    Sample,
    ShardError,
    ShardInfo,
    check_index,
    load_shard,
    record_keys,
    shard_layers,
    write_shard,
)

__all__ = [
    "ACTIVATION_DTYPES",
    "EMBEDDING",
    "KIND_KEYS",
    "OPTIONAL_KEYS",
    "RECORD_KEYS",
    "Rows",
    "Sample",
    "ShardError",
    "ShardInfo",
    "check_index",
    "load_shard",
    "record_keys",
    "shard_layers",
    "write_shard",
]
