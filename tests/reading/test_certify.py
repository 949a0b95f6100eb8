"""certify measures against independent float32 runs, and sees what is not the model's."""

import json
import re

import numpy as np
import pytest

from qwen_jax.__main__ import main
from qwen_jax.errors import BadDataError, ConfigError, UsageError
from qwen_jax.ledger.names import shard_number
from qwen_jax.reading.fidelity import drawn_samples, record_fidelity, why_not_recorded
from qwen_jax.reading.runs import open_runs
from qwen_jax.run import recorded
from tests.reading.conftest import all_rows, extract


def fidelity(folder) -> dict:
    return json.loads((folder / "metadata.json").read_text())["fidelity"]


@pytest.mark.wide
def test_a_sound_run_passes_and_says_so_in_its_metadata(copy, capsys):
    assert main(["certify", str(copy.folder), "--samples", "2"]) == 0
    record = fidelity(copy.folder)
    assert record["passed"] and len(record["samples"]) == 2
    assert set(record["references"]) == {"qwen_jax float32", "Hugging Face float32"}
    for kinds in record["references"].values():
        assert list(kinds["residual"]) == ["1", "3"]
        assert all(0 <= layer["relative"] < 1e-5 for layer in kinds["residual"].values())
        assert all(layer["min_cosine"] > 1 - 1e-9 for layer in kinds["residual"].values())
    assert "within the tolerance" in capsys.readouterr().out
    assert main(["verify", str(copy.folder)]) == 0


def test_other_numbers_fail_and_are_measured(copy, capsys):
    def disturb(shard):
        for record in shard[3]:
            record["activation"] *= 1.01
            record["activation"][0, 0] += 0.8

    metadata = json.loads((copy.folder / "metadata.json").read_text())
    for number in range(1, len(metadata["shards"]) + 1):
        copy.shard(number, disturb)
    assert main(["certify", str(copy.folder), "--samples", "2"]) == 1
    record = fidelity(copy.folder)
    assert not record["passed"] and "BEYOND THE TOLERANCE" in capsys.readouterr().out
    for kinds in record["references"].values():
        assert kinds["residual"]["3"]["relative"] == pytest.approx(0.01, rel=0.05)
        assert kinds["residual"]["3"]["max_abs"] > 0.7
        assert kinds["residual"]["1"]["relative"] < 1e-5


@pytest.mark.wide
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_not_finite_fails_and_is_recorded_as_null(copy, capsys, value):
    def spoil(shard):
        for record in shard[1]:
            record["activation"][3, 5] = value

    for path in copy.folder.glob("shard_*"):
        copy.shard(shard_number(path.name), spoil)
    assert main(["certify", str(copy.folder), "--samples", "1"]) == 1
    record = fidelity(copy.folder)
    assert not record["passed"]
    for kinds in record["references"].values():
        assert set(kinds["residual"]["1"].values()) == {None}
        assert kinds["residual"]["3"]["relative"] < 1e-5
    shown = capsys.readouterr().out
    assert "BEYOND THE TOLERANCE" in shown and shown.count(" not finite") == 6


def test_tokens_of_another_line_are_refused(copy):
    def swap(shard):
        tokens = shard[1][0]["token_ids"][::-1].copy()
        for layer in shard.values():
            layer[0]["token_ids"] = tokens

    copy.shard(1, swap)
    with pytest.raises(BadDataError, match=r"sample 0: its tokens are not those of its line"):
        main(["certify", str(copy.folder), "--samples", "99"])


@pytest.mark.wide
def test_every_kind_and_kept_rows_alone(tmp_path, capsys):
    flags = ("--activation_type", "mlp", "attn", "--include_embedding", "--keep_tokens", "every:7")
    folder = extract(tmp_path / "kinds", *flags, "--activation_dtype", "float16", "--max_samples", "3")
    assert main(["certify", str(folder), "--samples", "1"]) == 0
    record = fidelity(folder)
    assert record["tolerance"] == pytest.approx(1e-4 + 2**-10)
    for kinds in record["references"].values():
        assert list(kinds) == ["mlp", "attn", "embedding"]
        assert all(layer["relative"] < 2**-10 for layers in kinds.values() for layer in layers.values())
    assert np.isfinite([float(x) for x in re.findall(r"\d\.\d\de[+-]\d\d", capsys.readouterr().out)]).all()


@pytest.mark.wide
@pytest.mark.parametrize("attention", ["ragged", "blocked"])
def test_a_run_of_a_tpu_or_gpu_is_certified_on_any_machine(copy, attention):
    def elsewhere(metadata):
        metadata["settings"] |= {"attention": attention, "model_parallel": 2}
        metadata["fingerprint"]["compute_dtype"] = metadata["compute_dtype"] = "bfloat16"

    copy.metadata(elsewhere)
    assert main(["certify", str(copy.folder), "--samples", "1"]) == 0
    assert fidelity(copy.folder)["tolerance"] == pytest.approx(5e-2, rel=1e-3)
    with pytest.raises(ConfigError, match="model_parallel"):  # to repair it takes a machine like the run's
        recorded.recorded_job(json.loads((copy.folder / "metadata.json").read_text()), None, None)


def test_weights_are_shared_over_devices_where_this_machine_has_as_many(copy, monkeypatch):
    copy.metadata(lambda metadata: metadata["settings"].update(model_parallel=2))
    metadata = json.loads((copy.folder / "metadata.json").read_text())
    asked = []
    monkeypatch.setattr(recorded, "find_devices", lambda: [None] * 4)
    monkeypatch.setattr(recorded, "_job", lambda metadata, settings: asked.append(settings))
    recorded.reference_job(metadata, None, None)
    assert asked[0].model_parallel == 2


@pytest.mark.wide
def test_a_single_shard_is_certified_and_the_whole_runs_metadata_left_alone(copy, capsys):
    before = (copy.folder / "metadata.json").read_bytes()
    path = copy.folder / "shard_0002.pkl.gz"
    assert main(["certify", str(path), "--samples", "2"]) == 0
    assert (copy.folder / "metadata.json").read_bytes() == before
    assert "nothing was recorded" in capsys.readouterr().out
    (run,) = open_runs(path)
    entry = run.entry(path.name)
    drawn = [sample["sample_idx"] for sample in drawn_samples(run, 99, 0)]
    assert drawn[0] == entry["first_sample_idx"] and drawn[-1] == entry["last_sample_idx"]


@pytest.mark.wide
def test_an_unfinished_run_is_measured_and_its_metadata_left_to_its_worker(copy, capsys):
    copy.metadata(lambda metadata: metadata.update(status="in_progress"))
    before = (copy.folder / "metadata.json").read_bytes()
    assert main(["certify", str(copy.folder), "--samples", "1"]) == 0
    assert (copy.folder / "metadata.json").read_bytes() == before
    assert "nothing was recorded" in capsys.readouterr().out


def test_all_samples_are_drawn_once_in_order_and_the_record_is_added_to_the_rest(copy):
    (run,) = open_runs(copy.folder)
    drawn = list(drawn_samples(run, 10**6, seed=3))
    assert len({sample["sample_idx"] for sample in drawn}) == len(drawn) == run.metadata["totals"]["samples"]
    rows = np.concatenate([sample["kinds"]["residual"][3] for sample in drawn])
    np.testing.assert_array_equal(rows, all_rows(copy.folder, 3))
    some = [sample["sample_idx"] for sample in drawn_samples(run, 5, seed=3)]
    assert len(some) == 5 and some == sorted(some)
    assert some != [sample["sample_idx"] for sample in drawn_samples(run, 5, seed=4)]
    assert why_not_recorded(run) is None
    record_fidelity(run, {"passed": True})
    assert json.loads((copy.folder / "metadata.json").read_text()) == {
        **run.metadata,
        "fidelity": {"passed": True},
    }


def test_shards_without_metadata_are_refused(copy):
    (copy.folder / "metadata.json").unlink()
    with pytest.raises(UsageError, match=r"no metadata\.json"):
        main(["certify", str(copy.folder)])
