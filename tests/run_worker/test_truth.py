"""What is in the shards is what Hugging Face computes for the same prompts, sample by sample."""

import gzip
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qwen_jax.data.arc import parse_line
from qwen_jax.data.layouts import PROMPT_FORMATS
from qwen_jax.shards import load_shard
from tests.hf_reference import load_reference, reference_taps
from tests.run_worker.conftest import TASKS

TOLERANCE = 1e-4


def records(workspace) -> dict[int, list[dict]]:
    """All records of all shards, by layer."""
    merged: dict[int, list[dict]] = {}
    for path in workspace.shards():
        for layer, layer_records in load_shard(path).items():
            merged.setdefault(layer, []).extend(layer_records)
    return merged


def test_every_sample_and_layer_equals_hugging_face(finished):
    stored = records(finished)
    model = load_reference(finished.model)
    assert sorted(stored) == [0, 1, 2]
    skipped = {note["sample_idx"] for note in finished.metadata()["skipped"]}
    expected = [index for index in range(TASKS) if index not in skipped]
    assert [record["sample_idx"] for record in stored[0]] == expected
    assert len(expected) > TASKS / 2
    for index, first_layer in enumerate(stored[0]):
        tokens = first_layer["token_ids"]
        theirs = reference_taps(model, tokens[None])["residual"][:, 0]
        with torch.no_grad():
            hidden = model(
                torch.from_numpy(tokens[None].astype(np.int64)), output_hidden_states=True
            ).hidden_states
        for layer in range(3):
            record = stored[layer][index]
            assert record["shape"] == record["activation"].shape == (len(tokens), 64)
            error = np.abs(record["activation"] - theirs[layer]).max() / np.abs(theirs[layer]).max()
            assert error < TOLERANCE, (index, layer)
            if layer < 2:
                np.testing.assert_allclose(record["activation"], hidden[layer + 1][0], rtol=0, atol=2e-3)


def test_token_ids_are_the_prompt_of_the_stream_line(finished):
    """The prompt is rebuilt from the line, with as many leading examples dropped as the metadata says."""
    tokenizer = AutoTokenizer.from_pretrained(finished.model)
    dropped = {note["sample_idx"]: note["dropped_examples"] for note in finished.metadata()["shortened"]}
    assert dropped, "no prompt was over-long: the test stream is too easy"
    lines = finished.stream.read_bytes().splitlines()
    for record in records(finished)[0]:
        task = parse_line(lines[record["sample_idx"]])
        del task.train[: dropped.get(record["sample_idx"], 0)]
        prompt = "".join(segment.text for segment in PROMPT_FORMATS["rows"].segments(task))
        assert record["token_ids"].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert record["text_preview"] == prompt[:200]
        assert record["task_id"] == task.task_id
        assert len(record["token_ids"]) <= 640


def test_the_guides_snippet_opens_a_shard(finished):
    program = (
        "import pickle\nimport gzip\nimport sys\n"
        "with gzip.open(sys.argv[1], 'rb') as f:\n    data = pickle.load(f)\n"
        "print(sorted(data), sorted(data[0][0]), data[2][0]['activation'].shape == data[2][0]['shape'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(finished.shards()[0])], capture_output=True, text=True, check=True
    )
    keys = ["activation", "sample_idx", "shape", "task_id", "text_preview"]
    keys += ["token_cells", "token_ids", "token_roles"]
    assert done.stdout.strip() == f"[0, 1, 2] {keys} True"


def test_metadata_agrees_with_the_shards(finished):
    metadata = finished.metadata()
    assert metadata["status"] == "completed"
    assert [entry["filename"] for entry in metadata["shards"]] == [path.name for path in finished.shards()]
    assert len(metadata["shards"]) > 2
    for entry, path in zip(metadata["shards"], finished.shards(), strict=True):
        data = pickle.loads(gzip.decompress(path.read_bytes()))
        assert entry["bytes"] == path.stat().st_size
        assert entry["samples"] == len(data[0])
        assert (entry["first_sample_idx"], entry["last_sample_idx"]) == (
            data[0][0]["sample_idx"],
            data[0][-1]["sample_idx"],
        )
        assert entry["tokens"] == sum(len(record["token_ids"]) for record in data[0])
        assert entry["raw_bytes"] == sum(r["activation"].nbytes for layer in data.values() for r in layer)
        assert entry["raw_bytes"] >= 0.002 * 2**30 or entry is metadata["shards"][-1]


def test_checkpoint_has_the_guides_keys(finished):
    checkpoint = json.loads(finished.checkpoint.read_text())
    assert checkpoint.pop("fingerprint")
    assert checkpoint == {
        "worker_id": 5,
        "last_processed_sample_idx": TASKS - 1,
        "total_samples_processed": TASKS,
        "total_samples_written": finished.metadata()["totals"]["samples"],
        "total_shards": len(finished.shards()),
        "dataset_path": str(finished.stream),
        "model_path": str(finished.model),
        "status": "completed",
    }


@pytest.mark.wide
def test_taps_and_layers_are_those_asked_for(workspace, finished):
    workspace.run("--activation_type", "mlp", "--layers_to_extract", "2", "0", "--max_samples", "3")
    stored = records(workspace)
    assert sorted(stored) == [0, 2]
    model = load_reference(workspace.model)
    for index in range(3):
        theirs = reference_taps(model, stored[0][index]["token_ids"][None])["mlp"][:, 0]
        for layer in (0, 2):
            error = (
                np.abs(stored[layer][index]["activation"] - theirs[layer]).max() / np.abs(theirs[layer]).max()
            )
            assert error < TOLERANCE
    assert workspace.metadata()["layer_meaning"].startswith("output of block i's MLP")


@pytest.mark.wide
def test_stored_dtype(workspace, finished):
    workspace.run("--activation_dtype", "bfloat16", "--max_samples", "2")
    exact = records(finished)[1][0]["activation"]
    stored = records(workspace)[1][0]["activation"]
    assert str(stored.dtype) == "bfloat16"
    np.testing.assert_allclose(stored.astype(np.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.wide
def test_eight_devices_store_what_one_does(workspace, finished):
    """Also with the weights split over two devices each; metadata names the devices."""
    many = workspace.having(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    many.run("--max_samples", "6", "--model_parallel", "2")
    assert many.metadata()["written_by"]["devices"] == 8
    stored, expected = records(many), records(finished)
    for layer in range(3):
        assert stored[layer]
        for ours, theirs in zip(stored[layer], expected[layer], strict=False):
            assert ours["sample_idx"] == theirs["sample_idx"]
            np.testing.assert_allclose(ours["activation"], theirs["activation"], rtol=0, atol=1e-4)


def test_the_closing_line_says_how_many_did_not_fit_and_what_would(finished):
    """A finished worker that is started again says it once more. At that length none is shortened."""
    metadata = finished.metadata()
    said = finished.run().stdout.splitlines()[-1]
    longest = max(note["full_length"] for note in metadata["shortened"] + metadata["skipped"])
    assert f"{len(metadata['shortened'])} lost examples" in said
    assert said.endswith(f"--max_seq_length {longest} would keep them whole")
