"""What is written is what is read, by us and by the guide's snippet, and the bytes depend on values alone."""

import gzip
import io
import pickle
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from qwen_jax.shards import RECORD_KEYS, ShardError, compress, load_shard, write_shard
from tests.shards.samples import LAYERS, assert_same_shard, make_sample, make_samples, shard_bytes

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype, tmp_path):
    samples = make_samples(dtype)
    path = tmp_path / "shard_0001.pkl.gz"
    with open(path, "wb") as file:
        info = write_shard(file, LAYERS, samples)
    shard = load_shard(path)
    assert tuple(shard) == LAYERS
    for position, layer in enumerate(LAYERS):
        for sample, record in zip(samples, shard[layer], strict=True):
            assert tuple(record) == RECORD_KEYS
            assert record["activation"].dtype == dtype and record["activation"].flags.writeable
            assert record["activation"].tobytes() == sample.activations[position].tobytes()
            assert record["shape"] == sample.activations[position].shape == record["activation"].shape
            assert record["token_ids"].dtype == np.int32
            assert record["token_ids"].tolist() == sample.token_ids.tolist()
            assert (record["sample_idx"], record["task_id"]) == (sample.sample_idx, sample.task_id)
            assert record["text_preview"] == sample.text_preview
    itemsize = np.dtype(dtype).itemsize
    assert info.samples == 4 and info.tokens == 308 and info.raw_bytes == 3 * 308 * 8 * itemsize
    assert (info.first_sample_idx, info.last_sample_idx) == (0, 1 << 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_guides_snippet_works_unchanged(dtype, tmp_path):
    (tmp_path / "shard_0001.pkl.gz").write_bytes(shard_bytes(make_samples(dtype)))
    code = """
import pickle
import gzip

# Load a shard
with gzip.open('shard_0001.pkl.gz', 'rb') as f:
    data = pickle.load(f)
records = [records[2] for records in data.values()]
print(sorted(data), records[0]['shape'], records[0]['activation'].dtype, records[0]['activation'].shape)
print(len({id(r['token_ids']) for r in records}), float(records[1]['activation'].astype('f8').sum()))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    total = float(make_samples(dtype)[2].activations[1].astype("f8").sum())
    assert run.stdout == f"[0, 3, 7] (300, 8) {np.dtype(dtype)} (300, 8)\n1 {total}\n"


@pytest.mark.parametrize("load", [pickle.load, pickle._load], ids=["C", "python"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_of_pythons_unpicklers_read_the_same(load, dtype):
    data = shard_bytes(make_samples(dtype))
    assert_same_shard(load(io.BytesIO(gzip.decompress(data))), load_shard(io.BytesIO(data)))


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_pickle_itself_writes(protocol, dtype):
    shard = load_shard(io.BytesIO(shard_bytes(make_samples(dtype))))
    shard[0][1]["sample_idx"] = np.int64(2)
    data = gzip.compress(pickle.dumps(shard, protocol))
    shard[0][1]["sample_idx"] = 2
    assert_same_shard(load_shard(io.BytesIO(data)), shard)


@pytest.mark.parametrize("threads", [1, 2, 5, None])
def test_bytes_do_not_depend_on_threads(threads, monkeypatch):
    monkeypatch.setattr(compress, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(compress, "IN_PLACE_BYTES", 100)
    assert shard_bytes(make_samples(), threads=threads) == shard_bytes(make_samples(), threads=3)


def test_bytes_do_not_depend_on_object_identity():
    task, preview = "same task", "same preview"
    shared = [replace(make_sample(n), task_id=task, text_preview=preview) for n in range(3)]
    copies = [
        replace(make_sample(n), task_id="".join(task), text_preview=str(preview.encode(), "utf8"))
        for n in range(3)
    ]
    tokens = shared[0].token_ids
    one_array = [replace(sample, token_ids=tokens) for sample in shared]
    many_arrays = [
        replace(sample, token_ids=tokens.copy(), task_id=str(b"same task", "utf8")) for sample in copies
    ]
    assert shard_bytes(shared) == shard_bytes(copies)
    assert shard_bytes(one_array) == shard_bytes(many_arrays)


def test_bytes_do_not_depend_on_memory_layout():
    sample = make_sample(1, n_tokens=6)
    as_list = replace(sample, activations=[np.asfortranarray(layer) for layer in sample.activations])
    padded = np.zeros((3, 9, 8), np.float32)
    padded[:, :6] = sample.activations
    assert shard_bytes([sample]) == shard_bytes([as_list])
    assert shard_bytes([sample]) == shard_bytes([replace(sample, activations=padded[:, :6])])


def test_token_ids_are_stored_once():
    samples = [make_sample(1, n_tokens=50)]
    raw = gzip.decompress(shard_bytes(samples))
    assert raw.count(samples[0].token_ids.tobytes()) == 1
    shard = load_shard(io.BytesIO(gzip.compress(raw)))
    assert shard[0][0]["token_ids"] is shard[7][0]["token_ids"]


def test_more_samples_than_a_one_byte_memo_index():
    samples = [make_sample(n, n_tokens=1) for n in range(300)]
    data = shard_bytes(samples)
    assert_same_shard(pickle.load(io.BytesIO(gzip.decompress(data))), load_shard(io.BytesIO(data)))
    assert load_shard(io.BytesIO(data))[7][299]["token_ids"].tolist() == samples[299].token_ids.tolist()


def test_writing_never_holds_a_second_copy():
    class Sink:
        def write(self, data) -> int:
            return len(data)

    samples = [make_sample(n, n_tokens=500, hidden=1000) for n in range(20)]  # 120 MB
    tracemalloc.start()
    write_shard(Sink(), LAYERS, samples, threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": np.zeros((2, 5, 8), np.float32)}, "has 2 layers, the shard 3"),
        ({"activations": np.zeros((3, 4, 8), np.float32)}, r"should have activations float32\[5, 8\]"),
        ({"activations": np.zeros((3, 5, 9), np.float32)}, r"got float32\[5, 9\]"),
        ({"activations": np.zeros((3, 5, 8), np.float16)}, "got float16"),
        ({"activations": np.zeros((3, 0, 8), np.float32), "token_ids": np.zeros(0, np.int32)}, "no tokens"),
        ({"token_ids": np.zeros(5, np.int64)}, "token_ids int64"),
        ({"sample_idx": 1}, "sample 1 comes after sample 1"),
        ({"sample_idx": -1}, "negative index"),
    ],
)
def test_samples_that_do_not_fit_together_are_refused(change, message):
    file = io.BytesIO()
    with pytest.raises(ShardError, match=message):
        write_shard(file, LAYERS, [make_sample(1), replace(make_sample(2), **change)])
    assert file.getvalue() == b""


@pytest.mark.parametrize("layers", [(), (1, 1, 2), (-1, 0, 1)])
def test_bad_layers_are_refused(layers):
    with pytest.raises(ShardError, match="layers must be"):
        write_shard(io.BytesIO(), layers, [make_sample(1)])


def test_no_samples_and_odd_dtypes_are_refused():
    with pytest.raises(ShardError, match="at least one sample"):
        write_shard(io.BytesIO(), LAYERS, [])
    with pytest.raises(ShardError, match="got float64"):
        write_shard(io.BytesIO(), LAYERS, [make_sample(1, dtype=np.float64)])


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ShardError, match=r"gone\.pkl\.gz: No such file"):
        load_shard(tmp_path / "gone.pkl.gz")
    bad = tmp_path / "bad.pkl.gz"
    bad.write_bytes(b"no gzip")
    with pytest.raises(ShardError, match=r"bad\.pkl\.gz is not a whole shard"):
        load_shard(bad)


def test_shards_start_without_jax():
    code = (
        "import sys, qwen_jax.shards; sys.exit('jax' in sys.modules or 'google.cloud.storage' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


ANSWER = {
    "answer_logprobs": np.zeros(3, np.float32),
    "answer_token_ids": np.arange(3, dtype=np.int32),
    "answer_positions": np.arange(2, 5, dtype=np.int32),
}


def test_answers_are_read_as_they_were_written():
    shard = load_shard(io.BytesIO(shard_bytes([replace(make_sample(0), extras=ANSWER)])))
    for layer in LAYERS:
        for key, array in ANSWER.items():
            assert shard[layer][0][key].dtype == array.dtype
            np.testing.assert_array_equal(shard[layer][0][key], array)


@pytest.mark.parametrize(
    "key, array",
    [
        ("answer_logprobs", np.zeros(3, np.int32)),
        ("answer_logprobs", np.zeros((3, 1), np.float32)),
        ("answer_token_ids", np.zeros(3, np.float32)),
        ("answer_token_ids", np.zeros(2, np.int32)),
        ("answer_positions", np.zeros((3, 2), np.int32)),
        ("answer_positions", np.zeros(4, np.int32)),
    ],
)
def test_answers_of_another_shape_are_neither_written_nor_read(key, array):
    with pytest.raises(ShardError, match=key):
        shard_bytes([replace(make_sample(0), extras={**ANSWER, key: array})])
    shard = load_shard(io.BytesIO(shard_bytes([replace(make_sample(0), extras=ANSWER)])))
    for records in shard.values():
        records[0][key] = array
    with pytest.raises(ShardError, match=key):
        load_shard(io.BytesIO(gzip.compress(pickle.dumps(shard, 4))))
