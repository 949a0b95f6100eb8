"""One layer of a shard in a bucket costs its own bytes and few requests, and is of one generation, checked."""

import functools
import gc
import io
import tempfile
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from torch.utils.data import DataLoader

from qwen_jax import shards
from qwen_jax.errors import BadDataError, StorageError
from qwen_jax.reading import export, inspect, iter_activations, iter_samples, load_shard, open_runs
from qwen_jax.reading.torch import ActivationDataset
from qwen_jax.shards import Sample, ShardError, write_shard
from qwen_jax.shards.parts import TAIL_BYTES
from qwen_jax.storage.gcs import GcsStore
from qwen_jax.storage.opening import open_store
from tests.fake_gcs import FakeGcs, Fault
from tests.shards.samples import without_index
from tests.waiting import until

LAYERS, HIDDEN, MOST_REQUESTS = 24, 64, 6
TOKENS = (2050, 3)
"""Of each sample: the first one's rows are members of their own."""
URL = "gs://bucket/run/tpu_0"


@functools.cache
def shard_of(number: int, seed: int = 0) -> bytes:
    """A shard like real ones but narrower: what layers share is a larger part of it."""
    rng, samples = np.random.default_rng([number, seed]), []
    for index, count in enumerate(TOKENS):
        rows = rng.standard_normal((LAYERS, count, HIDDEN), np.float32).astype(ml_dtypes.bfloat16)
        tokens = rng.integers(0, 150_000, count, dtype=np.int32)
        roles = {"token_roles": np.arange(count, dtype=np.int32) // 50}
        samples.append(Sample(10 * number + index, rows, tokens, "preview", "task", roles))
    file = io.BytesIO()
    write_shard(file, range(LAYERS), samples)
    return file.getvalue()


NAMES = {f"shard_{number:04d}.pkl.gz": number for number in (1, 2)}
ONE = "shard_0001.pkl.gz"


@pytest.fixture
def server(monkeypatch) -> Iterator[FakeGcs]:
    with FakeGcs() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        for name, number in NAMES.items():
            server.store("bucket", {"name": f"run/tpu_0/{name}"}, shard_of(number), {})
        yield server


def wanted(layers, data: bytes | None = None) -> dict:
    return shards.load_shard(io.BytesIO(data or shard_of(1)), layers=layers)


def assert_same_rows(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for layer, records in expected.items():
        for one, other in zip(found[layer], records, strict=True):
            assert one["activation"].tobytes() == other["activation"].tobytes()
            assert one["token_ids"].tolist() == other["token_ids"].tolist()


def of_shards(server: FakeGcs) -> list[str]:
    """The requests for shards, their content or what they are."""
    return [path for method, path in server.requests if method == "GET" and ".pkl.gz" in path]


@pytest.mark.parametrize("layer", [0, 11, 23])
def test_one_layer_takes_its_share_of_the_bytes(server, layer):
    assert_same_rows(load_shard(f"{URL}/{ONE}", layers=[layer]), wanted([layer]))
    # Beside 1.1 / 24, the tail that the index is in: far below 256 kB, which would hide half of so small a shard.
    assert server.sent_bytes <= 1.1 / LAYERS * len(shard_of(1)) + TAIL_BYTES < 0.1 * len(shard_of(1))
    assert len(of_shards(server)) <= MOST_REQUESTS


@pytest.mark.parametrize("layers", [[1, 2, 3], [0, 5, 11, 17, 23], list(range(1, 24, 2)), list(range(24))])
def test_any_layers_take_few_requests(server, layers):
    assert_same_rows(load_shard(f"{URL}/{ONE}", layers=layers), wanted(layers))
    assert len(of_shards(server)) <= MOST_REQUESTS
    assert server.sent_bytes <= len(shard_of(1)) + TAIL_BYTES


def read_rows() -> int:
    return sum(map(len, iter_activations("gs://bucket/run", 11, 512, shuffle_buffer=1000)))


def read_samples() -> int:
    return sum(len(sample["token_ids"]) for sample in iter_samples("gs://bucket/run", layers=[11]))


def read_in_workers() -> int:
    dataset = ActivationDataset("gs://bucket/run", 11, 512)
    return sum(map(len, DataLoader(dataset, batch_size=None, num_workers=2)))


@pytest.mark.parametrize("read", [read_rows, read_samples, read_in_workers])
def test_readers_of_many_shards_take_no_more(server, read):
    assert read() == len(NAMES) * sum(TOKENS)
    assert server.sent_bytes <= share_of_all()
    assert len(of_shards(server)) <= len(NAMES) * MOST_REQUESTS


@pytest.mark.parametrize(
    "read",
    [
        lambda: iter_samples("gs://bucket/run", layers=[11]),
        lambda: iter_activations("gs://bucket/run", 11, 100),
    ],
    ids=["samples", "rows"],
)
def test_a_reader_that_stops_early_leaves_no_copies(server, tmp_path, monkeypatch, read):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for number in range(3, 10):  # more than are read ahead
        server.store("bucket", {"name": f"run/tpu_0/shard_{number:04d}.pkl.gz"}, shard_of(1), {})
    reader = read()
    next(reader)
    until(lambda: list(tmp_path.iterdir()))
    del reader
    gc.collect()
    assert not list(tmp_path.iterdir())


def share_of_all() -> float:
    return sum(1.1 / LAYERS * len(shard_of(number)) + TAIL_BYTES for number in NAMES.values())


def test_export_and_inspect_take_no_more(server, tmp_path):
    export.export("gs://bucket/run", "npy", tmp_path, layers=[7])
    # The rows are counted first where no metadata.json says how many they are.
    assert server.sent_bytes <= 2.5 * share_of_all()
    records = [record for number in NAMES.values() for record in wanted([7], shard_of(number))[7]]
    rows = np.concatenate([record["activation"] for record in records])
    np.testing.assert_array_equal(np.load(tmp_path / "layer_07.npy"), rows.astype(np.float32))
    server.sent_bytes = 0
    lines = list(inspect.describe(open_runs(f"{URL}/{ONE}")))
    assert "  layers   0-23: activation" in lines and server.sent_bytes <= share_of_all()
    assert any(f"{LAYERS * sum(TOKENS) * HIDDEN * 2 / 1e9:.3f} GB" in line for line in lines)


def test_a_shard_that_does_not_say_where_its_layers_lie_is_fetched_whole(server):
    open_store(URL).put_bytes(ONE, without_index(shard_of(1)))
    assert_same_rows(load_shard(f"{URL}/{ONE}", layers=[11]), wanted([11]))
    assert server.sent_bytes >= len(without_index(shard_of(1)))


def test_a_damaged_tail_says_nothing_and_the_whole_is_fetched(server):
    server.faults.append(Fault("corrupt", "GET", "alt=media"))
    assert_same_rows(load_shard(f"{URL}/{ONE}", layers=[11]), wanted([11]))
    assert server.sent_bytes > len(shard_of(1))


@pytest.mark.parametrize("nth", [2, 3])
def test_a_damaged_range_is_an_error(server, nth):
    """What the layers share, and the layer."""
    server.faults.append(Fault("corrupt", "GET", "alt=media", nth=nth))
    with pytest.raises(ShardError, match=f"{URL}/{ONE} is not a whole shard"):
        load_shard(f"{URL}/{ONE}", layers=[11])


def test_a_shard_that_is_replaced_meanwhile_is_the_old_or_the_new(server, monkeypatch):
    fetch, new, fetched = GcsStore.download_range, shard_of(1, seed=1), []

    def replacing(self, info, start, end, file):
        fetched.append(start)
        if len(fetched) == 3:  # the tail and the head are those of the old one
            open_store(URL).put_bytes(ONE, new)
        fetch(self, info, start, end, file)

    monkeypatch.setattr(GcsStore, "download_range", replacing)
    assert_same_rows(load_shard(f"{URL}/{ONE}", layers=[11]), wanted([11], new))
    assert len(fetched) == 6


def test_a_shard_that_is_replaced_again_and_again_is_an_error(server, monkeypatch):
    fetch = GcsStore.download_range

    def replacing(self, info, start, end, file):
        open_store(URL).put_bytes(ONE, shard_of(1))
        fetch(self, info, start, end, file)

    monkeypatch.setattr(GcsStore, "download_range", replacing)
    with pytest.raises(StorageError, match="was replaced each time that it was read"):
        load_shard(f"{URL}/{ONE}", layers=[11])


def test_what_is_not_there_is_said(server):
    with pytest.raises(ShardError, match=rf"{URL}/{ONE} has no layer 24, but 0, 1, .*23; ask"):
        load_shard(f"{URL}/{ONE}", layers=[24])
    with pytest.raises(BadDataError, match="shard_0009.pkl.gz is not there"):
        load_shard(f"{URL}/shard_0009.pkl.gz", layers=[1])
    with pytest.raises(ShardError, match="lies in a bucket: qwen_jax.reading.load_shard reads it"):
        shards.load_shard(f"{URL}/{ONE}", layers=[1])
