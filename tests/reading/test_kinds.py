"""Kinds of every width, in one run: stored, read, verified, certified, exported."""

import json
import shutil

import numpy as np
import pytest
from datasets import load_from_disk

from qwen_jax.__main__ import main
from qwen_jax.kinds import KINDS
from qwen_jax.reading import iter_activations, iter_samples
from tests.reading.conftest import extract

# The demo's model: 4 heads of 16, an MLP of 128.
WIDTHS = dict.fromkeys(KINDS, 64) | {"mlp_act": 128}
HOOKS = {
    "mlp_act": "blocks.1.mlp.hook_post",
    "attn_heads": "blocks.1.attn.hook_z",
    "mlp_in": "blocks.1.ln2.hook_normalized",
    "resid_mid": "blocks.1.hook_resid_mid",
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The widest kind is the main one, the embedding is narrower."""
    kinds = ("mlp_act", *(kind for kind in KINDS if kind != "mlp_act"))
    flags = (
        "--activation_type",
        *kinds,
        "--include_embedding",
        "--layers_to_extract",
        "1",
        "--max_samples",
        "3",
    )
    return extract(tmp_path_factory.mktemp("everything"), *flags)


@pytest.mark.wide
def test_each_kind_is_read_at_its_width(everything):
    for kind, width in WIDTHS.items():
        samples = list(iter_samples(everything, layers=[1], kind=kind))
        assert len(samples) == 3
        assert {sample["activations"][1].shape[1] for sample in samples} == {width}, kind
        (rows,) = list(iter_activations(everything, layer=1, batch_size=5000, kind=kind))
        assert rows.shape == (sum(len(sample["token_ids"]) for sample in samples), width)
    embedded = next(iter_samples(everything, layers=["embedding"]))
    assert embedded["activations"]["embedding"].shape[1] == 64


def test_kinds_add_up(everything):
    """What the sublayers take in, give and add."""
    of = {kind: next(iter_samples(everything, layers=[1], kind=kind))["activations"][1] for kind in KINDS}
    np.testing.assert_allclose(of["residual"], of["resid_mid"] + of["mlp"], atol=1e-4)
    assert not np.allclose(of["mlp_in"], of["resid_mid"])


@pytest.mark.wide
def test_such_a_run_is_whole_and_certified(everything, capsys):
    assert main(["verify", str(everything)]) == 0
    assert main(["certify", str(everything), "--samples", "1"]) == 0
    printed = capsys.readouterr().out
    assert "against Hugging Face float32" in printed
    for kind in (*KINDS, "embedding"):
        assert printed.count(f"\n  {kind} ") == 2, kind
    assert main(["inspect", str(everything)]) == 0
    assert "128 (mlp_act)" in capsys.readouterr().out


@pytest.mark.parametrize("kind, hook", HOOKS.items())
def test_exports_carry_the_hooks_name_and_the_kinds_width(everything, tmp_path, kind, hook):
    out = str(tmp_path / "out")
    assert (
        main(
            [
                "export",
                str(everything),
                "--to",
                "hf_dataset",
                "--output",
                out,
                "--kind",
                kind,
                "--layers",
                "1",
            ]
        )
        == 0
    )
    data = load_from_disk(f"{out}/layer_01")
    assert hook in data.column_names
    assert np.array(data[0][hook]).shape[1] == WIDTHS[kind]


def test_a_width_that_the_metadata_does_not_say_is_a_fault(everything, tmp_path, capsys):
    copy = shutil.copytree(everything, tmp_path / "worker_0")
    metadata = json.loads((copy / "metadata.json").read_text())
    metadata["widths"]["attn_heads"] = 32
    (copy / "metadata.json").write_text(json.dumps(metadata))
    assert main(["verify", str(copy)]) == 1
    assert "has attn_heads of width 64, metadata.json says 32" in capsys.readouterr().out
