"""A shard says where each layer lies, in a way that gzip and pickle pass over, and a reader of one layer reads that."""

import gzip
import io
import struct
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from qwen_jax.shards import EMBEDDING, ShardError, check_index, load_shard, shard_layers
from qwen_jax.shards.compress import Span
from qwen_jax.shards.parts import (
    HEAD,
    TAIL_BYTES,
    Part,
    index_member,
    parse_index,
    ranges,
    read_index,
    wanted_parts,
)
from tests.shards.samples import LAYERS, assert_same_shard, make_sample, shard_bytes, without_index


def everything(index: int):
    """A sample with all that a record may hold: several kinds, the embedding, arrays of its rows and its answer."""
    sample, other = make_sample(index, 40, hidden=32), make_sample(index + 100, 40, hidden=32)
    extras = {
        "token_roles": np.arange(40, dtype=np.int32),
        "token_cells": np.full((40, 4), index, np.int32),
        "answer_logprobs": np.full(3, -1, np.float32),
        "answer_token_ids": np.arange(3, dtype=np.int32),
        "answer_positions": np.arange(3, dtype=np.int32),
    }
    kinds = {"mlp": sample.activations, "residual": other.activations}
    return replace(sample, extras=extras, kinds=kinds, embedding=other.activations[0])


SHARD = shard_bytes([everything(index) for index in range(3)])
WHOLE = load_shard(io.BytesIO(SHARD))
PARTS = read_index(io.BytesIO(SHARD))


class Watched(io.BytesIO):
    """Notes where it is read."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self.read_at: set[int] = set()

    def read(self, size=-1):
        at = self.tell()
        data = super().read(size)
        self.read_at |= set(range(at, at + len(data)))
        return data


def test_the_parts_are_the_whole_shard_and_each_is_gzip_of_its_own():
    assert [part.key for part in PARTS] == [HEAD, *LAYERS, EMBEDDING]
    assert PARTS[0].start == 0 and all(before.end == after.start for before, after in pairwise(PARTS))
    assert gzip.decompress(SHARD) == b"".join(gzip.decompress(SHARD[part.start : part.end]) for part in PARTS)
    assert gzip.decompress(SHARD[PARTS[-1].end :]) == b""


@pytest.mark.parametrize("layers", [[0], [3], [7], [EMBEDDING], [0, 7], [3, EMBEDDING], [0, 3, 7, EMBEDDING]])
def test_layers_are_read_from_their_own_bytes_alone(layers):
    file = Watched(SHARD)
    assert_same_shard(load_shard(file, layers=layers), {layer: WHOLE[layer] for layer in layers})
    own = [range(part.start, part.end) for part in wanted_parts(PARTS, layers)]
    tail = range(max(0, len(SHARD) - TAIL_BYTES), len(SHARD))
    assert file.read_at == set().union(*own, tail)


def test_the_array_of_the_main_kind_is_there_once():
    for record in load_shard(io.BytesIO(SHARD), layers=[3])[3]:
        assert record["activation"] is record["mlp"] and record["residual"] is not record["mlp"]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: str(part.key))
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_changed_bit_in_a_part_is_an_error_where_that_is_read(part, place):
    at = {"first": part.start, "middle": (part.start + part.end) // 2, "last": part.end - 1}[place]
    broken = bytearray(SHARD)
    broken[at] ^= 1
    for layer in WHOLE:
        if part.key in (HEAD, layer):
            with pytest.raises(ShardError):
                load_shard(io.BytesIO(broken), layers=[layer])
        else:
            assert_same_shard(load_shard(io.BytesIO(broken), layers=[layer]), {layer: WHOLE[layer]})


def test_what_gzip_does_not_check_the_index_does():
    """The header's byte for the system and the time are in no checksum of gzip's."""
    broken = bytearray(SHARD)
    broken[PARTS[1].start + 4] ^= 1
    assert_same_shard(load_shard(io.BytesIO(broken)), WHOLE)
    with pytest.raises(ShardError, match="has a damaged part, 0: its checksum"):
        load_shard(io.BytesIO(broken), layers=[0])


def test_a_changed_index_is_an_error_or_none():
    """Whatever bit of it changes, no other values come out."""
    start = PARTS[-1].end
    for at in range(start, len(SHARD)):
        broken = bytearray(SHARD)
        broken[at] ^= 4
        try:
            some = load_shard(io.BytesIO(broken), layers=[3])
        except ShardError:
            continue
        assert_same_shard(some, {3: WHOLE[3]})


def made(keys, sizes, end: bytes = b"") -> bytes:
    """What stands where a shard's parts do, and an index that says this of it."""
    return bytes(sum(sizes)) + index_member(keys, [Span(size, 0) for size in sizes]) + end


@pytest.mark.parametrize(
    "data",
    [
        made([HEAD, 1], [5, 5])[1:],
        b"x" + made([HEAD, 1], [5, 5]),
        made([1, 2], [5, 5]),
        made([HEAD, 1, 1], [5, 5, 5]),
        made([], []),
    ],
    ids=["cut", "shifted", "no head", "a layer twice", "no parts"],
)
def test_an_index_of_other_bytes_is_an_error(data):
    with pytest.raises(ShardError, match="has an index of other layers than it holds"):
        load_shard(io.BytesIO(data), layers=[1])


def test_an_index_counts_only_at_the_very_end():
    assert read_index(io.BytesIO(made([HEAD, 1], [5, 5], b"x"))) == []
    assert read_index(io.BytesIO(b"")) == read_index(io.BytesIO(b"short")) == []


def test_an_index_that_claims_to_begin_before_the_file():
    (size,) = struct.unpack("<I", SHARD[-22:-18])
    with pytest.raises(ShardError, match="damaged index"):
        load_shard(io.BytesIO(SHARD[len(SHARD) - size + 1 :]), layers=[0])


def test_a_shard_without_an_index_is_read_and_says_its_layers(tmp_path):
    path = tmp_path / "shard"
    for data in (SHARD, without_index(SHARD)):
        path.write_bytes(data)
        assert shard_layers(path) == [*LAYERS, EMBEDDING]
        check_index(path, WHOLE, "it")
        assert_same_shard(load_shard(path, layers=[3]), {3: WHOLE[3]})
    with pytest.raises(ShardError, match="other layers"):
        path.write_bytes(SHARD)
        check_index(path, LAYERS, "it")


def test_more_layers_than_an_index_holds_are_stored_without_one():
    layers = range(1100)
    sample = make_sample(0, 1, hidden=1, n_layers=len(layers))
    data = shard_bytes([sample], layers)
    assert read_index(io.BytesIO(data)) == []
    assert float(load_shard(io.BytesIO(data), layers=[1099])[1099][0]["activation"][0, 0]) == float(
        sample.activations[1099, 0, 0]
    )


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ShardError, match="has no layer 5, but 0, 3, 7, embedding; ask for one of these"):
        load_shard(io.BytesIO(SHARD), layers=[3, 5])


def test_a_shard_that_begins_inside_an_open_file():
    file = io.BytesIO(b"before" + SHARD)
    file.seek(6)
    assert_same_shard(load_shard(file, layers=[7]), {7: WHOLE[7]})


@pytest.mark.parametrize(
    "layers, most, expected",
    [
        ([], 4, []),
        ([0], 4, [(0, 20)]),
        ([2], 4, [(0, 10), (30, 40)]),
        ([2, 3], 4, [(0, 10), (30, 50)]),
        ([1, 4, 6], 2, [(0, 30), (50, 80)]),
        ([2, 6], 2, [(0, 40), (70, 80)]),
        ([0, 1, 2, 3, 4, 5, 6], 2, [(0, 80)]),
        ([6], 1, [(0, 80)]),
    ],
)
def test_ranges_hold_what_is_wanted_in_few_pieces(layers, most, expected):
    parts = [Part(key, 10 * place, 10, 0) for place, key in enumerate([HEAD, *range(7)])]
    assert ranges(wanted_parts(parts, layers), most) == expected


def test_the_index_of_a_tail_is_that_of_the_file():
    big = shard_bytes([make_sample(0, 700, hidden=64)])
    assert len(big) > 3 * TAIL_BYTES
    assert parse_index(big[-TAIL_BYTES:], len(big)) == read_index(io.BytesIO(big))
