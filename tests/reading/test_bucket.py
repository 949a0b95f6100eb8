"""The same reading from a bucket, through google-cloud-storage and the bucket double."""

import json

import numpy as np
import pytest

from qwen_jax.__main__ import main
from qwen_jax.errors import BadDataError
from qwen_jax.reading import iter_activations, open_runs
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


def test_commands_take_the_address(bucket, capsys, tmp_path):
    assert main(["inspect", URL]) == 0
    assert main(["verify", URL, "--streams", str(STREAMS)]) == 0
    assert main(["stats", URL]) == 0
    assert main(["export", URL, "--to", "npy", "--output", str(tmp_path), "--layers", "3"]) == 0
    assert main(["certify", URL, "--samples", "1"]) == 0
    assert json.loads(bucket.get_bytes("metadata.json")[0])["fidelity"]["passed"]
    assert "samples: 36, each stored once" in capsys.readouterr().out


def test_faults_in_a_bucket_are_found(bucket):
    data, info = bucket.get_bytes("shard_0003.pkl.gz")
    bucket.put_bytes("shard_0003.pkl.gz", data[:-3], if_generation=info.generation)
    assert ["shard_0003.pkl.gz: has" in str(fault) for fault in verify_runs(open_runs(URL))] == [True]
    bucket.delete("shard_0003.pkl.gz")
    assert ["shard_0003.pkl.gz: is missing" in str(fault) for fault in verify_runs(open_runs(URL))] == [True]
    bucket.put_bytes("shard_0003.pkl.gz", data)


def test_an_empty_address_says_what_to_give(bucket):
    with pytest.raises(BadDataError, match="holds no shards and no metadata.json; give"):
        open_runs("gs://bucket/elsewhere")
