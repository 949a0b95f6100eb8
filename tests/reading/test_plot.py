"""What a picture shows is what was stored, and what was not recorded it does not show as measured."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from qwen_jax.__main__ import main
from qwen_jax.errors import UsageError
from qwen_jax.reading import plot
from qwen_jax.reading.runs import open_runs
from qwen_jax.shards import load_shard
from qwen_jax.shards.statistics import MASSIVE, shard_stats, stats_bytes
from tests.reading.conftest import extract


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """A run of two kinds; tests only read it."""
    flags = ("--activation_type", "residual", "mlp", "--max_samples", "4")
    return extract(tmp_path_factory.mktemp("kinds"), *flags)


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, output: figures.append(figure))
    return figures


def panels(figure: Figure) -> dict:
    """By the first words of their titles."""
    return {re.match(r"\w+", axes.get_title()).group(): axes for axes in figure.axes}


@pytest.mark.parametrize("flags, kind", [((), "residual"), (("--kind", "mlp"), "mlp")])
def test_a_kinds_own_values_are_drawn_and_named(kinds, drawn, flags, kind):
    assert main(["plot", str(kinds), "-o", "run.png", *flags]) == 0
    (figure,) = drawn
    assert figure.get_suptitle().startswith(f"demo/model, float32, 1 worker, {kind}\n")
    assert panels(figure)["Norm"].get_title() == f"Norm of a row, {kind}"
    assert panels(figure)["Massive"].get_title() == f"Massive channels, {kind}"
    (line,) = panels(figure)["Norm"].get_lines()
    shard = load_shard(next(kinds.glob("shard_*")))
    for layer, median in zip(*line.get_data(), strict=True):
        norms = [np.linalg.norm(record[kind], axis=1) for record in shard[layer]]
        assert median == pytest.approx(np.median(np.concatenate(norms)), rel=0.1)


def test_a_kind_that_is_not_stored_is_refused(kinds, clean):
    for folder, kind in ((kinds, "attn"), (clean, "mlp")):
        with pytest.raises(UsageError, match=f"kind {kind} is not stored; there is residual"):
            main(["plot", str(folder), "-o", "run.png", "--kind", kind])


def test_without_metadata_the_lines_are_not_recorded(kinds, drawn, tmp_path):
    shutil.copy(kinds / "shard_0001.pkl.gz", tmp_path)
    assert main(["plot", str(tmp_path), "-o", "run.png"]) == 0
    axes = panels(drawn[0])["Stream"]
    assert [text.get_text() for text in axes.texts] == ["not recorded: no metadata.json"]
    assert not axes.patches


def test_the_lines_of_one_shard_are_those_of_its_run(kinds, drawn):
    assert main(["plot", str(kinds / "shard_0001.pkl.gz"), "-o", "run.png"]) == 0
    axes = panels(drawn[0])["Stream"]
    assert axes.get_title() == "Stream lines of the whole run"
    assert "100.0 % (4)" in axes.texts[0].get_text()


def test_lengths_are_whole_numbers(drawn, tmp_path):
    folder = extract(tmp_path / "last", "--keep_tokens", "last", "--max_samples", "3")
    assert main(["plot", str(folder), "-o", "run.png"]) == 0
    axes = panels(drawn[0])["Length"]
    for axis in (axes.xaxis, axes.yaxis):
        assert all(float(tick).is_integer() for tick in axis.get_ticklocs())


def test_a_channel_that_is_massive_at_one_row_is_marked(copy, drawn):
    def plant(shard):
        shard[3][0]["activation"][2, 17] = 1000 * MASSIVE

    copy.shard(1, plant)
    shard = load_shard(copy.folder / "shard_0001.pkl.gz")
    (copy.folder / "stats_0001.safetensors").write_bytes(stats_bytes(shard_stats(shard, ["residual"])))
    (copy.folder / "stats.safetensors").unlink()
    plot.plot_runs(open_runs(copy.folder), "run.png")
    axes = panels(drawn[0])["Massive"]
    assert [text.get_text().strip() for text in axes.texts] == ["17"]
