"""The names of what a worker leaves, and of the folders it lies in."""

import re

METADATA_NAME = "metadata.json"
SHARD_PREFIX, SHARD_SUFFIX = "shard_", ".pkl.gz"
STATS_PREFIX, STATS_SUFFIX = "stats", ".safetensors"
STATS_NAME = STATS_PREFIX + STATS_SUFFIX
CHECKPOINT_PATTERN, PROGRESS_NAME = "checkpoint_worker_*.json", "progress.json"
"""In a worker's folder of a bucket."""


def shard_name(number: int) -> str:
    """The file name of the `number`th shard, counted from 1."""
    return f"{SHARD_PREFIX}{number:04d}{SHARD_SUFFIX}"


def shard_number(name: str) -> int | None:
    """The number of a shard's file name; None for other names."""
    match = re.fullmatch(f"{SHARD_PREFIX}([0-9]{{4,12}}){re.escape(SHARD_SUFFIX)}", name)
    return int(match.group(1)) if match else None


def shard_stats_name(number: int) -> str:
    """The statistics file of the `number`th shard, counted from 1."""
    return f"{STATS_PREFIX}_{number:04d}{STATS_SUFFIX}"


def stats_name_beside(shard: str) -> str:
    """The statistics file that belongs to a shard's file; raises ValueError for another file's name."""
    number = shard_number(shard)
    if number is None:
        raise ValueError(f"{shard} is no shard's name")
    return shard_stats_name(number)


def checkpoint_name(worker_id: int) -> str:
    return CHECKPOINT_PATTERN.replace("*", str(worker_id))


def progress_name(worker_id: int | None = None) -> str:
    """The progress record's name in a checkpoint folder, where workers lie side by side; without an id in a bucket."""
    return PROGRESS_NAME if worker_id is None else f"progress_worker_{worker_id}.json"


def local_folder(worker_id: int) -> str:
    """A worker's folder below --output_dir."""
    return f"worker_{worker_id}"


def bucket_folder(worker_id: int | str) -> str:
    """A worker's folder below a bucket's prefix."""
    return f"tpu_{worker_id}"
