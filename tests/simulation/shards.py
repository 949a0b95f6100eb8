"""The shards of a simulated run: few and small, made once by the real code."""

import functools
import io
from typing import Any

import numpy as np

from qwen_jax.run.pipeline import FilledShard
from qwen_jax.shards import ShardInfo, write_shard
from qwen_jax.shards.statistics import Stats, merge_stats, stats_bytes
from tests.run_worker.conftest import captured_sample
from tests.simulation.bucket import crc32c

SHARDS = 3
LINES = SHARDS + 1
"""The stream's last line is skipped, so that the last marker says more than the last shard does."""


class KnownShard(FilledShard):
    """A shard whose statistics are computed once."""

    def stats(self, layers: Any) -> Stats:
        return shard_stats(self)


@functools.cache
def filled(number: int, bits: int) -> FilledShard:
    """The shard after `number` others, as a machine of these bits computes it."""
    activations = np.full((1, 2, 4), 1.0 + number + bits / 8, np.float32)
    shard = KnownShard()
    shard.add(captured_sample(number, activations))
    return shard


_stats: dict[int, Stats] = {}


def shard_stats(shard: FilledShard) -> Stats:
    if id(shard) not in _stats:
        _stats[id(shard)] = FilledShard.stats(shard, (0,))
    return _stats[id(shard)]


@functools.cache
def written(sample_idx: int, value: float) -> tuple[bytes, ShardInfo]:
    bits = round((value - 1.0 - sample_idx) * 8)
    file = io.BytesIO()
    info = write_shard(file, (0,), [filled(sample_idx, bits).samples[0].for_shard()], threads=1)
    return file.getvalue(), info


def write_known_shard(file: Any, layers: Any, samples: Any) -> ShardInfo:
    """In the place of write_shard."""
    sample = samples[0]
    data, info = written(sample.sample_idx, float(sample.activations[0].pieces[0][0, 0]))
    file.write(data)
    return info


_stats_files: dict[int, tuple[Stats, bytes]] = {}


def stats_file(stats: Stats) -> bytes:
    """In the place of stats_bytes."""
    known = _stats_files.get(id(stats))
    if known is None or known[0] is not stats:
        known = (stats, stats_bytes(stats))
        if any(stats is shard for shard in _stats.values()):
            _stats_files[id(stats)] = known
    return known[1]


@functools.cache
def variants(number: int) -> dict[str, bytes]:
    """By the crc32c of what the `number`th shard (from 1) may be: its statistics."""
    both = [filled(number - 1, bits) for bits in (0, 1)]
    return {
        crc32c(written(number - 1, 1.0 + number - 1 + bits / 8)[0]): stats_file(shard_stats(shard))
        for bits, shard in enumerate(both)
    }


def stats_of(data: bytes) -> Stats:
    """The statistics of a shard, by its bytes."""
    for number in range(SHARDS):
        for bits in (0, 1):
            if written(number, 1.0 + number + bits / 8)[0] == data:
                return shard_stats(filled(number, bits))
    raise ValueError("a torn shard")


@functools.cache
def merged(shards: tuple[str, ...]) -> bytes:
    """The statistics of a whole run with shards of these crc32c."""
    parts = []
    for number, crc in enumerate(shards, 1):
        bits = list(variants(number)).index(crc)
        parts.append(shard_stats(filled(number - 1, bits)))
    return stats_bytes(merge_stats(parts))
