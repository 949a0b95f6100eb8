"""Durable local files, and objects in a bucket or a folder, with preconditions."""

from qwen_jax.storage.atomic import atomic_write, write_json
from qwen_jax.storage.checksum import file_crc32c
from qwen_jax.storage.opening import open_store
from qwen_jax.storage.store import ObjectInfo, PreconditionFailedError, Store

__all__ = [
    "ObjectInfo",
    "PreconditionFailedError",
    "Store",
    "atomic_write",
    "file_crc32c",
    "open_store",
    "write_json",
]
