"""Of a shard that does not say where its layers lie, one is read without the bytes of the others, from any file, and no
false size leads astray."""

import gzip
import io
import pickle
import random
import struct

import numpy as np
import pytest

from qwen_jax.shards import ShardError, load_shard
from qwen_jax.shards.compress import Budget, GzipReader, MalformedError, compress_block
from tests.shards.samples import LAYERS, assert_same_shard, make_sample, shard_bytes, without_index

# Samples whose activations are large enough to be members of their own, and small ones between them.
SAMPLES = [make_sample(n, n_tokens, hidden=256) for n, n_tokens in enumerate((700, 3, 1500, 9, 400))]
SHARD = without_index(shard_bytes(SAMPLES))
WHOLE = load_shard(io.BytesIO(SHARD))


class Counted(io.BytesIO):
    """Counts the bytes that are read from it."""

    taken = 0

    def read(self, size=-1):
        data = super().read(size)
        self.taken += len(data)
        return data


class Pipe(Counted):
    """A file that only goes forwards."""

    def seekable(self):
        return False

    def seek(self, *args):
        raise OSError("Illegal seek")


def members(data: bytes) -> list[tuple[int, int]]:
    """Start and end of each member, by the sizes in their headers."""
    found, start = [], 0
    while start < len(data):
        assert data[start + 12 : start + 16] == b"QM\x04\x00"
        (size,) = struct.unpack_from("<I", data, start + 16)
        found.append((start, start + size))
        start += size
    assert start == len(data)
    return found


@pytest.mark.parametrize("size", [0, 1, 16, 17, 5000, 1 << 20])
def test_a_member_says_its_size_and_any_gzip_reads_it(size):
    block = random.Random(size).randbytes(size)
    member = compress_block(block)
    assert members(member) == [(0, len(member))] and gzip.decompress(member) == block


@pytest.mark.parametrize("file", [Counted, Pipe])
@pytest.mark.parametrize("layers", [[layer] for layer in LAYERS] + [[0, 7]])
def test_some_layers_are_those_of_the_whole(layers, file):
    some = load_shard(file(SHARD), layers=layers)
    assert_same_shard(some, {layer: WHOLE[layer] for layer in layers})


def test_the_last_layer_takes_little_more_than_its_own_bytes():
    file = Counted(SHARD)
    load_shard(file, layers=[LAYERS[-1]])
    assert file.taken < 0.55 * len(SHARD)  # of three layers


def test_what_is_jumped_over_is_not_looked_at_and_else_it_is():
    start, end = max(members(SHARD)[:6], key=lambda member: member[1] - member[0])
    broken = bytearray(SHARD)
    broken[(start + end) // 2] ^= 1
    assert_same_shard(load_shard(io.BytesIO(broken), layers=[7]), {7: WHOLE[7]})
    for wanted in (None, [0]):
        with pytest.raises(ShardError, match="bad gzip data"):
            load_shard(io.BytesIO(broken), layers=wanted)


def test_a_shard_that_pickle_and_gzip_wrote_has_no_sizes_and_is_read_all_the_same():
    written = gzip.compress(pickle.dumps(WHOLE, 4))
    assert_same_shard(load_shard(io.BytesIO(written), layers=[7]), {7: WHOLE[7]})


def reader_of(*blocks: bytes) -> GzipReader:
    return GzipReader(io.BytesIO(b"".join(map(compress_block, blocks))), Budget())


@pytest.mark.parametrize("seed", range(20))
def test_reading_and_skipping_go_through_the_content_as_slices_do(seed):
    rng = random.Random(seed)
    blocks = [rng.randbytes(rng.choice((0, 1, 300, 70_000, 300_000))) for _ in range(12)]
    content, reader, at = b"".join(blocks), reader_of(b"x", *blocks), 0
    assert reader.read(1) == b"x"
    while at < len(content):
        step = min(rng.choice((1, 1000, 80_000, 400_000)), len(content) - at)
        if rng.random() < 0.6:
            reader.skip(step)
        else:
            assert reader.read(step) == content[at : at + step]
        at += step
    assert reader.read(1) == b""


def test_skipping_beyond_the_end():
    reader = reader_of(b"abc", bytes(1000))
    with pytest.raises(MalformedError, match="ends in the middle"):
        reader.skip(1004)


@pytest.mark.parametrize("size", [0, 1, 27, 10**9, 2**32 - 1, "one less", "one more"])
def test_a_false_size_is_an_error_or_changes_nothing(size):
    start, end = members(SHARD)[2]
    true = end - start
    size = {"one less": true - 1, "one more": true + 1}.get(size, size)
    false = bytearray(SHARD)
    struct.pack_into("<I", false, start + 16, size)
    assert_same_shard(load_shard(io.BytesIO(false)), WHOLE)  # all of it is read, no size is needed
    try:
        some = load_shard(io.BytesIO(false), layers=[7])
    except ShardError:
        return
    assert_same_shard(some, {7: WHOLE[7]})


def test_a_cut_shard_is_an_error_for_each_layer_that_is_cut():
    for keep in (0.3, 0.6, 0.97):
        with pytest.raises(ShardError):
            load_shard(io.BytesIO(SHARD[: int(keep * len(SHARD))]), layers=[7])


def test_a_wanted_record_cannot_be_made_of_what_was_skipped():
    record = WHOLE[0][0] | {"activation": np.ones((2000, 256), np.float32), "shape": (2000, 256)}
    record["token_ids"] = np.zeros(2000, np.int32)
    data = gzip.compress(pickle.dumps({0: [record], 7: [record]}, 4))  # pickle stores the array once
    assert_same_shard(load_shard(io.BytesIO(data)), {0: [record], 7: [record]})
    with pytest.raises(ShardError, match="activation is no two-dimensional float array"):
        load_shard(io.BytesIO(data), layers=[7])
