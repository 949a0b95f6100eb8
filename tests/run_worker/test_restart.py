"""A run that is cut and started again ends as one that was not, byte for byte."""

import json
import shutil
import signal
import time
from dataclasses import replace

import ml_dtypes  # noqa: F401  (safetensors reads bfloat16 only with it)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax.shards import load_shard
from tests.run_worker.conftest import TASKS, Workspace, tree
from tests.run_worker.starts import ROOT


def committed_shards(workspace) -> int:
    if not workspace.checkpoint.exists():
        return 0
    return json.loads(workspace.checkpoint.read_text())["total_shards"]


AFTER_THE_FIRST_SHARD = "checkpoint_local:2"
"""The first checkpoint is that of the empty run."""


def test_killed_between_shards_and_restarted(workspace, finished):
    workspace.killed_at(AFTER_THE_FIRST_SHARD)
    assert 0 < committed_shards(workspace) < len(finished.shards())
    done = workspace.run()
    assert "resumes at sample" in done.stderr
    assert tree(workspace.output) == tree(finished.output)
    assert workspace.checkpoint.read_bytes() == finished.checkpoint.read_bytes()


@pytest.mark.slow
def test_forty_ctrl_cs_at_random_times(workspace, finished):
    """Python's own end must not meet a thread in foreign code: that aborts the process."""
    rng, codes = np.random.default_rng(0), []
    workspace = workspace.having(
        PYTHONPATH=str(ROOT)
    )  # tests.as_installed takes a second, before any of our code
    while len(codes) < 40:
        process = replace(workspace, forked=False).start()
        time.sleep(rng.uniform(0.6, 8))  # before that Python itself starts, and imports the script
        process.send_signal(signal.SIGINT)
        codes.append(process.wait())
        assert codes[-1] in (130, 0), process.output()
        if codes[-1] == 0:
            assert tree(workspace.output) == tree(finished.output)
            shutil.rmtree(workspace.output)
            workspace.checkpoint.unlink()
    assert codes.count(130) > 20
    workspace.run()
    assert tree(workspace.output) == tree(finished.output)


def test_a_finished_worker_changes_nothing(workspace):
    def times() -> dict[str, int]:
        files = [*workspace.output.iterdir(), *workspace.checkpoint.parent.iterdir()]
        return {path.name: path.stat().st_mtime_ns for path in files if path.name != ".worker_5.lock"}

    workspace = workspace.having(PROGRESS_INTERVAL_S="60")
    workspace.run("--max_samples", "2")
    before = times()
    assert {"checkpoint_worker_5.json", "progress_worker_5.json", "metadata.json"} < before.keys()
    done = workspace.run("--max_samples", "2")
    assert "has completed its stream already" in done.stderr
    assert times() == before


def test_a_local_bucket_holds_what_the_folder_holds(workspace, finished):
    bucket = workspace.root / "bucket"
    bucket.mkdir()
    flags = ("--upload_to_gcs", "--gcs_bucket", f"file://{bucket}", "--delete_local_after_upload")
    workspace.run(*flags)
    stored, local = tree(bucket / "activations" / "tpu_5"), tree(finished.output)
    assert stored.pop("checkpoint_worker_5.json") == finished.checkpoint.read_bytes()
    here, there = (json.loads(each.pop("metadata.json")) for each in (local, stored))
    assert there == here | {"uploaded_to": f"file://{bucket}/activations/tpu_5"}
    assert stored == local and not workspace.shards()


@pytest.mark.wide
def test_a_run_that_has_uploaded_is_not_gone_on_with_without_its_bucket(cloud):
    cloud.run("--max_samples", "2")
    alone = Workspace(cloud.model, cloud.stream, cloud.cache, cloud.root)
    flags = ("--max_samples", "2", "--max_seq_length", "256", "--shard_size_gb", "0.0003")
    done = alone.run(*flags, expect=78)
    assert "uploads to gs://bucket/activations/tpu_5" in done.stderr and "--upload_to_gcs" in done.stderr
    alone.run(*flags, "--force_restart")
    alone.run(*flags)


def test_a_missing_folder_is_no_bucket(workspace):
    bucket = workspace.root / "not_mounted"
    done = workspace.run("--upload_to_gcs", "--gcs_bucket", f"file://{bucket}", expect=2)
    assert "there is no such folder" in done.stderr and not bucket.exists()


def test_a_bucket_without_upload_is_warned_of(workspace):
    done = workspace.having(GCS_BUCKET="my-bucket").run("--max_samples", "1")
    assert "nothing is uploaded to my-bucket: that takes --upload_to_gcs too" in done.stderr


def test_no_checkpointing(workspace, finished):
    workspace.run("--no_checkpointing")
    assert not workspace.checkpoint.exists()
    assert tree(workspace.output) == tree(finished.output)


@pytest.mark.wide
def test_other_settings_are_refused_by_name(workspace):
    workspace.run("--max_samples", "2")
    done = workspace.run("--max_samples", "2", "--activation_type", "attn", expect=78)
    assert "activation_type: was 'residual', is 'attn'" in done.stderr
    workspace.run("--max_samples", "2", "--activation_type", "attn", "--force_restart")
    assert workspace.metadata()["activation_type"] == "attn"


def test_bad_lines_are_skipped_listed_and_never_shift_the_others(workspace, finished, tmp_path):
    lines = finished.stream.read_bytes().splitlines(keepends=True)
    lines[1:1] = [b"not json\n", b'{"train": [], "test": []}\n']
    stream = tmp_path / "bad.jsonl"
    stream.write_bytes(b"".join(lines[:5]) + b"\n")
    done = workspace.run(stream=stream)
    metadata = workspace.metadata()
    assert [(note["line"], note["bad_record"]) for note in metadata["skipped"]] == [
        (2, True),
        (3, True),
        (6, True),
    ]
    assert "not JSON" in metadata["skipped"][0]["reason"]
    assert metadata["totals"]["samples"] == 3
    assert metadata["last_processed_sample_idx"] == 5
    assert "line 2: skipped: not JSON" in done.stderr
    assert "3 skipped" in done.stdout


def test_too_many_bad_lines_stop_the_run(workspace, tmp_path):
    stream = tmp_path / "bad.jsonl"
    stream.write_text("nonsense\n" * 4)
    done = workspace.run("--max_bad_records", "3", stream=stream, expect=65)
    assert "line 1: not JSON" in done.stderr and "--max_bad_records 3" in done.stderr


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (("--layers_to_extract", "0", "3"), 2, "layers 0 to 2, got 3"),
        (("--layers_to_extract", "1", "1"), 2, "twice"),
        (("--upload_to_gcs",), 2, "--gcs_bucket"),
        (("--max_seq_length", "40000"), 78, "32768 positions"),
        (("--model_path", "/nowhere"), 78, "no such folder"),
        (("--dataset_path", "/nowhere.jsonl"), 78, "create_dataset_streams.py"),
        (("--prompt_format", "__import__('os')"), 2, "invalid choice"),
    ],
)
def test_wrong_settings_end_with_a_message_and_write_nothing(workspace, flags, code, words):
    done = workspace.run(*flags, expect=code)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not workspace.shards() and not workspace.checkpoint.exists()


def test_all_lines_are_accounted_for(finished):
    totals = finished.metadata()["totals"]
    assert totals["samples"] + totals["skipped"] == TASKS


@pytest.mark.wide
def test_activations_beyond_float16_are_refused_not_stored(workspace, tmp_path):
    """One embedding channel of 1e6 overflows float16; the same model in bfloat16 is fine."""
    tensors = load_file(workspace.model / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 1e6
    model = tmp_path / "large"
    shutil.copytree(workspace.model, model)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    flags = ("--model_path", str(model), "--max_samples", "2")
    done = workspace.run(*flags, "--activation_dtype", "float16", expect=78)
    assert "65504" in done.stderr and not workspace.shards()
    workspace.elsewhere("bfloat16").run(*flags, "--activation_dtype", "bfloat16")


@pytest.mark.wide
def test_a_changed_batch_size_is_allowed_and_said(workspace, finished):
    workspace.killed_at(AFTER_THE_FIRST_SHARD)
    done = workspace.run("--batch_size", "1")
    assert "batch_size was 2, is 1; tokens_per_step was 512, is 256" in done.stderr
    assert "not bit for bit" in done.stderr
    theirs, ours = (merged_records(each) for each in (finished, workspace))
    assert [each["sample_idx"] for each in ours] == [each["sample_idx"] for each in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine["activation"], other["activation"], rtol=0, atol=1e-4)


def merged_records(workspace) -> list[dict]:
    """The last layer's records of all shards."""
    return [record for path in workspace.shards() for record in load_shard(path)[2]]


def test_a_stream_without_a_usable_sample_is_refused_with_what_it_looks_like(workspace, tmp_path):
    stream = tmp_path / "bad.jsonl"
    stream.write_text('{"examples": [], "source": ""}\n' * 2)
    done = workspace.run(stream=stream, expect=65)
    assert f"{stream}: nothing was stored, since none of its 2 lines can be used" in done.stderr
    assert "rows of a dataset become a stream with create_dataset_streams.py" in done.stderr
    assert not workspace.shards()
    workspace.run(stream=stream, expect=65)
