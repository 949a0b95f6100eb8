"""Quantised rows: what a shard holds of them, what comes back, and what of a stranger's is refused."""

import gzip
import io
import pickle
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from qwen_jax.shards import QuantisedRows, Rows, Sample, ShardError, load_shard, restore, stored_bytes
from qwen_jax.shards.parts import PartReader, read_index, wanted_parts
from tests.shards.samples import LAYERS, assert_same_shard, make_sample, shard_bytes

DTYPES = ("int8", "float8_e4m3fn")
WIDTH, EXACT = 24, 4


def rows_of(seed: int, count: int, dtype: str, exact=ml_dtypes.bfloat16) -> QuantisedRows:
    """The codes in two pieces, as steps leave them."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-100, 100, (count, WIDTH)).astype(dtype)
    channels = np.argsort(rng.random((count, WIDTH)), axis=1)[:, :EXACT].astype(np.int32)
    values = (1000 * rng.standard_normal((count, EXACT))).astype(exact)
    pieces = [piece for piece in np.split(codes, [count // 3]) if len(piece)]
    return QuantisedRows(Rows(pieces), rng.random(count, np.float32), channels, values)


def sample_of(index: int, dtype: str, n_tokens: int = 9) -> Sample:
    """Two kinds and the embedding."""
    kinds = {
        kind: [rows_of(100 * index + 10 * number + layer, n_tokens, dtype) for layer in range(len(LAYERS))]
        for number, kind in enumerate(("residual", "mlp"))
    }
    plain = make_sample(index, n_tokens)
    embedded = rows_of(index, n_tokens, dtype)
    return replace(plain, activations=kinds["residual"], kinds=kinds, embedding=embedded)


def value_by_value(rows: QuantisedRows) -> np.ndarray:
    """A loop over the definition."""
    codes = np.concatenate(rows.codes.pieces)
    values = np.empty(codes.shape, np.float32)
    for row, channel in np.ndindex(codes.shape):
        exact = np.flatnonzero(rows.channels_NK[row] == channel)
        scaled = np.float32(codes[row, channel]) * rows.scale_N[row]
        values[row, channel] = rows.exact_NK[row, exact[0]] if len(exact) else scaled
    return values


@pytest.fixture(scope="module", params=DTYPES)
def written(request):
    samples = [sample_of(index, request.param) for index in (0, 4)]
    return samples, shard_bytes(samples)


def test_load_shard_gives_the_values_and_nothing_of_the_codes(written):
    samples, data = written
    shard = load_shard(io.BytesIO(data))
    for place, sample in enumerate(samples):
        for position, layer in enumerate(LAYERS):
            record = shard[layer][place]
            assert record["residual"] is record["activation"] and record["activation"].flags.writeable
            np.testing.assert_array_equal(record["activation"], value_by_value(sample.activations[position]))
            np.testing.assert_array_equal(record["mlp"], value_by_value(sample.kinds["mlp"][position]))
            assert not any("scale" in key or "exact" in key for key in record)
        embedded = shard["embedding"][place]["activation"]
        np.testing.assert_array_equal(embedded, value_by_value(sample.embedding))


def test_the_guides_snippet_and_restore_give_the_same(written):
    samples, data = written
    stored = pickle.loads(gzip.decompress(data))
    raw = load_shard(io.BytesIO(data), raw=True)
    assert_same_shard(stored, raw)
    restored = {layer: [restore(record) for record in records] for layer, records in stored.items()}
    assert_same_shard(restored, load_shard(io.BytesIO(data)))
    first = stored[LAYERS[0]][0]
    assert first["activation"].itemsize == 1 and first["exact_values"].dtype == ml_dtypes.bfloat16
    assert sum(stored_bytes(r) for records in raw.values() for r in records) == sum(s.nbytes for s in samples)


def test_one_layer_is_read_without_the_others(written):
    _, data = written
    whole, layer = load_shard(io.BytesIO(data)), LAYERS[1]
    file = io.BytesIO(data)
    parts = wanted_parts(read_index(file), [layer])
    alone = load_shard(PartReader(file, parts), layers=[layer])
    assert_same_shard(alone, {layer: whole[layer]})
    assert_same_shard(load_shard(io.BytesIO(data), layers=[layer]), alone)


def test_rows_that_are_not_quantised_are_left_as_they_are():
    record = load_shard(io.BytesIO(shard_bytes([make_sample(0)])))[LAYERS[0]][0]
    assert restore(record)["activation"] is record["activation"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": np.ones(3, np.float32)}, "scale is float32"),
        ({"scale": np.ones(9)[:, None].astype(np.float32)}, "scale is float32"),
        ({"scale": np.full(9, np.nan, np.float32)}, "no scale"),
        ({"scale": np.full(9, -1, np.float32)}, "no scale"),
        ({"scale": "1"}, "no arrays"),
        ({"scale": None}, "beside"),
        ({"mlp_scale": None}, "beside"),
        ({"attn_scale": np.ones(9, np.float32)}, "beside"),
        ({"exact_channels": np.full((9, 4), WIDTH, np.int32)}, "different channels"),
        ({"exact_channels": np.full((9, 4), -1, np.int32)}, "different channels"),
        ({"exact_channels": np.zeros((9, 4), np.int32)}, "different channels"),
        ({"exact_channels": np.zeros((9, 4), np.float32)}, "exact_channels are float32"),
        ({"exact_values": np.zeros((9, 3), np.float32)}, "exact_values are"),
        ({"exact_values": np.zeros((9, 4), np.int8)}, "exact_values are"),
        ({"activation": np.zeros((9, WIDTH), np.float32)}, "mlp"),
    ],
)
def test_a_strangers_shard_whose_rows_cannot_be_restored_is_refused(change, message):
    shard = load_shard(io.BytesIO(shard_bytes([sample_of(0, "int8")])), raw=True)
    record = shard[LAYERS[1]][0] | change
    shard[LAYERS[1]][0] = {key: value for key, value in record.items() if value is not None}
    for raw in (False, True):
        with pytest.raises(ShardError, match=message):
            load_shard(io.BytesIO(gzip.compress(pickle.dumps(shard, 4))), raw=raw)


def test_codes_that_many_records_share_cannot_fill_the_memory():
    shard = load_shard(io.BytesIO(shard_bytes([sample_of(0, "int8", 1000)])), raw=True)
    first = shard[LAYERS[0]][0]
    many = [first | {"sample_idx": index} for index in range(5000)]
    data = gzip.compress(pickle.dumps({0: many}, 4))
    with pytest.raises(ShardError, match="unpacks to more than|more work"):
        load_shard(io.BytesIO(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_N": np.ones(2, np.float32)}, "scale is"),
        ({"exact_NK": np.ones((9, 4))}, "exact_values are"),
    ],
)
def test_a_writer_refuses_what_a_reader_would(change, message):
    sample = sample_of(0, "int8")
    broken = [replace(rows, **change) for rows in sample.activations]
    with pytest.raises(ShardError, match=message):
        shard_bytes([replace(sample, activations=broken, kinds={})])


def test_codes_without_a_scale_are_not_written():
    with pytest.raises(ShardError, match="QuantisedRows"):
        shard_bytes([make_sample(0, dtype=np.int8)])
