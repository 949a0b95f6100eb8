"""The same reading from a bucket, through google-cloud-storage and the bucket double."""

import json

import numpy as np
import pytest

from qwen_jax.__main__ import main
from qwen_jax.errors import BadDataError, StorageError, UsageError
from qwen_jax.reading import iter_activations, load_shard, open_runs
from qwen_jax.reading.verify import verify_runs
from qwen_jax.storage.opening import open_store
from tests.fake_gcs import FakeGcs
from tests.reading.conftest import STREAMS, all_rows

URL = "gs://bucket/activations"


@pytest.fixture(scope="module")
def bucket(clean):
    """The clean run as worker 0 of a bucket, and a second worker without files."""
    with FakeGcs() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        store = open_store(f"{URL}/tpu_0")
        for path in clean.iterdir():
            if not path.name.startswith("."):
                store.put_file(path.name, path)
        yield store


def test_a_bucket_reads_as_a_folder(bucket, clean):
    (run,) = open_runs(URL)
    assert run.where == f"{URL}/tpu_0" and run.shards == [path.name for path in sorted(clean.glob("shard_*"))]
    assert [each.where for each in open_runs(f"{URL}/tpu_0")] == [run.where]
    np.testing.assert_array_equal(np.concatenate(list(iter_activations(URL, 3, 999))), all_rows(clean, 3))
    one = list(iter_activations(f"{URL}/tpu_0/shard_0002.pkl.gz", 3, 10**6))
    assert len(one) == 1 and 0 < len(one[0]) < len(all_rows(clean, 3))


def test_one_shard_by_its_address(bucket, clean):
    address = f"{URL}/tpu_0/shard_0002.pkl.gz"
    ours, local = load_shard(address, layers=[3]), load_shard(clean / "shard_0002.pkl.gz", layers=[3])
    for one, other in zip(ours[3], local[3], strict=True):
        np.testing.assert_array_equal(one["activation"], other["activation"])
    with pytest.raises(UsageError, match="is no shard"):
        load_shard(URL)
    bucket.put_bytes("metadata.json", b"{torn")
    try:
        assert list(load_shard(address, layers=[3])) == [3]
    finally:
        bucket.put_file("metadata.json", clean / "metadata.json")


def test_what_is_written_on_the_local_disk_is_no_address(bucket, tmp_path):
    for command in (["export", URL, "--to", "npy", "--output"], ["stats", URL, "--output"]):
        with pytest.raises(UsageError, match="--output gs://bucket/out: this is written on the local disk"):
            main([*command, "gs://bucket/out"])


@pytest.mark.wide
def test_commands_take_the_address(bucket, capsys, tmp_path):
    assert main(["inspect", URL]) == 0
    bucket.put_file("streams.json", STREAMS)
    assert main(["verify", URL, "--streams", f"{URL}/tpu_0/streams.json"]) == 0
    with pytest.raises(StorageError, match="nowhere.json is not there"):
        main(["verify", URL, "--streams", f"{URL}/tpu_0/nowhere.json"])
    assert main(["stats", URL]) == 0
    assert main(["export", URL, "--to", "npy", "--output", str(tmp_path), "--layers", "3"]) == 0
    assert main(["certify", URL, "--samples", "1"]) == 0
    assert json.loads(bucket.get_bytes("metadata.json")[0])["fidelity"]["passed"]
    assert "samples: 36, each stored once" in capsys.readouterr().out


@pytest.mark.wide
def test_faults_in_a_bucket_are_found(bucket):
    data, info = bucket.get_bytes("shard_0003.pkl.gz")
    bucket.put_bytes("shard_0003.pkl.gz", data[:-3], if_generation=info.generation)
    (found,) = verify_runs(open_runs(URL)).faults
    assert "shard_0003.pkl.gz: has" in str(found)
    bucket.delete("shard_0003.pkl.gz")
    (found,) = verify_runs(open_runs(URL)).faults
    assert "shard_0003.pkl.gz: is missing" in str(found)
    assert main(["verify", URL, "--repair"]) == 0
    assert bucket.get_bytes("shard_0003.pkl.gz")[0] == data


def test_a_torn_shard_is_called_by_its_address(bucket):
    open_store("gs://bucket/loose").put_bytes("shard_0001.pkl.gz", b"no gzip")
    faults = verify_runs(open_runs("gs://bucket/loose")).faults
    assert any("gs://bucket/loose/shard_0001.pkl.gz is not a whole shard" in str(fault) for fault in faults)


def test_an_empty_address_says_what_to_give(bucket):
    with pytest.raises(BadDataError, match="holds no shards and no metadata.json; give"):
        open_runs("gs://bucket/elsewhere")
