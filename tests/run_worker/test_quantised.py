"""Runs that store a byte a value: interrupted or not, what is stored, what is said of it, and what is read of it."""

import gzip
import json
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_jax.kinds import EXACT_CHANNELS, STORED_DTYPES
from qwen_jax.reading import iter_activations, iter_samples
from qwen_jax.reading.export import export
from qwen_jax.reading.inspect import describe
from qwen_jax.reading.runs import open_runs
from qwen_jax.reading.verify_shard import ShardFaults
from qwen_jax.shards import load_shard
from qwen_jax.storage.checksum import file_crc32c
from tests.run_worker.conftest import tree
from tests.run_worker.test_truth import records

FLAGS = (
    "--activation_dtype",
    "int8",
    "--keep_tokens",
    "every:3",
    "--max_samples",
    "9",
    "--include_embedding",
)
SMALL = ("--shard_size_gb", "0.0001")


@pytest.fixture(scope="module")
def quantised(finished, tmp_path_factory):
    """An undisturbed run; tests only read it."""
    worker = finished.elsewhere(str(tmp_path_factory.mktemp("quantised")))
    worker.run(*FLAGS, *SMALL)
    return worker


@pytest.mark.wide
def test_killed_and_started_again_it_ends_the_same(workspace, quantised):
    killed = workspace.having(QWEN_JAX_FAILPOINT="shard_named:2")
    killed.run(*FLAGS, *SMALL, expect=-signal.SIGKILL)
    assert len(workspace.shards()) == 2 < len(quantised.shards())
    workspace.run(*FLAGS, *SMALL)
    assert tree(workspace.output) == tree(quantised.output)


def exact_rows(finished, layer: int, count: int) -> list[np.ndarray]:
    """What the run would have stored in float32."""
    return [record["activation"][::3].astype(np.float64) for record in records(finished)[layer][:count]]


def test_what_is_lost_is_in_the_metadata(quantised, finished):
    """Against the values of a run that stores them exactly."""
    metadata = quantised.metadata()
    stats = load_file(quantised.output / "stats.safetensors")
    for layer in range(3):
        stored = records(quantised)[layer]
        x_ND = np.concatenate(exact_rows(finished, layer, len(stored)))
        found_ND = np.concatenate([record["activation"] for record in stored])
        assert found_ND.dtype == np.float32 and found_ND.shape == x_ND.shape
        e_ND, said = x_ND - found_ND, metadata["statistics"]["residual"][str(layer)]
        assert 0 < said["relative_error"] < 0.01
        error = np.linalg.norm(e_ND) / np.linalg.norm(x_ND)
        np.testing.assert_allclose(said["relative_error"], error, rtol=1e-3)
        variance = np.square(e_ND).sum() / np.square(found_ND - found_ND.mean(0)).sum()
        np.testing.assert_allclose(said["unexplained_variance"], variance, rtol=1e-3)
        lengths_N = np.linalg.norm(x_ND, axis=1) * np.linalg.norm(found_ND, axis=1)
        assert abs(said["cosine"] - ((x_ND * found_ND).sum(1) / lengths_N).mean()) < 1e-7
        np.testing.assert_allclose(stats["residual.max_error"][layer], np.abs(e_ND).max(0), rtol=1e-3)
        assert said["max_error_channel"] == np.abs(e_ND).max(0).argmax()
    assert "relative_error" in metadata["statistics"]["embedding"]["embedding"]


def test_the_bytes_are_counted_as_they_are(quantised):
    metadata = quantised.metadata()
    width, rows = metadata["model"]["hidden_size"], 3 + 1  # the layers and the embedding
    of_a_token = rows * (width + 4 + EXACT_CHANNELS * (4 + 4))
    assert of_a_token == rows * STORED_DTYPES["int8"].row_bytes(width, "float32")
    assert metadata["totals"]["raw_bytes"] == metadata["totals"]["tokens"] * of_a_token
    shard = pickle.loads(gzip.decompress(quantised.shards()[0].read_bytes()))
    arrays = [array for each in shard.values() for r in each for array in map(r.get, RAW)]
    assert sum(array.nbytes for array in arrays) == metadata["shards"][0]["raw_bytes"]


RAW = ("activation", "scale", "exact_channels", "exact_values")


def test_readers_and_exports_give_values(quantised, tmp_path):
    whole = np.concatenate([record["activation"] for record in records(quantised)[1]])
    read = np.concatenate(list(iter_activations(quantised.output, 1, 100)))
    np.testing.assert_array_equal(read, whole)
    samples = [sample["activations"][1] for sample in iter_samples(quantised.output, layers=[1])]
    np.testing.assert_array_equal(np.concatenate(samples), whole)
    export(quantised.output, "npy", tmp_path / "npy", layers=[1])
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "layer_01.npy"), whole)


def test_a_person_sees_what_was_lost(quantised):
    said = "\n".join(describe(open_runs(quantised.output)))
    assert (
        "  values   int8, width 64\n" in said and "  lost     of residual at most: relative error 0.0" in said
    )
    (alone,) = open_runs(quantised.shards()[0])
    raw = quantised.metadata()["shards"][0]["raw_bytes"]
    assert f"; {raw / 1e9:.3f} GB" in "\n".join(describe([alone]))


def damaged(quantised, tmp_path, change) -> list[str]:
    """What verify finds where one sample's record was changed, and size and checksum recorded anew."""
    folder = shutil.copytree(quantised.output, tmp_path / "worker_5")
    path = folder / "shard_0001.pkl.gz"
    shard = load_shard(path, raw=True)
    change(shard[1][0])
    path.write_bytes(gzip.compress(pickle.dumps(shard, 4)))
    metadata = json.loads((folder / "metadata.json").read_text())
    size, crc32c = file_crc32c(path)
    metadata["shards"][0].update(bytes=size, crc32c=crc32c)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (run,) = open_runs(folder)
    return ShardFaults(run, path.name).find()


def scale_once_more(record: dict) -> None:
    record["scale"][0] *= 1.5


def other_exact_value(record: dict) -> None:
    record["exact_values"][0, 0] *= 2


def other_channels(record: dict) -> None:
    record["exact_channels"][0] = [
        channel for channel in range(9) if channel not in record["exact_channels"][0]
    ][:4]


def too_short(record: dict) -> None:
    record["scale"] = record["scale"][:-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: None, None),
        (scale_once_more, "in its statistics"),
        (other_exact_value, "in its statistics"),
        (other_channels, "in its statistics"),
        (too_short, "cannot be restored: scale is float32"),
    ],
    ids=["nothing", "scale", "exact value", "its channel", "too short"],
)
def test_verify_finds_what_was_changed(quantised, tmp_path, change, said):
    found = damaged(quantised, tmp_path, change)
    assert any(said in fault for fault in found) if said else not found, found


@pytest.mark.slow
def test_a_lost_shard_is_made_again_and_the_run_is_certified(quantised, tmp_path):
    folder = shutil.copytree(quantised.root, tmp_path / "root") / "activations" / "worker_5"
    lost = (folder / "shard_0002.pkl.gz").read_bytes()
    (folder / "shard_0002.pkl.gz").unlink()
    for command in (["verify", "--repair"], ["verify"], ["certify", "--samples", "3"]):
        done = subprocess.run(
            [sys.executable, "-m", "qwen_jax", *command, str(folder)],
            env=quantised.environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (folder / "shard_0002.pkl.gz").read_bytes() == lost
