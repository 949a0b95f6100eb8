"""One picture of a run: norms by layer, sample lengths, shortened samples, massive channels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import ConfigError
from qwen_jax.reading.runs import Run
from qwen_jax.reading.samples import shard_samples
from qwen_jax.reading.statistics import merged_stats
from qwen_jax.shards import EMBEDDING
from qwen_jax.shards.statistics import MASSIVE, KindStats

MAX_SHARDS = 8
_ROWS_A_SAMPLE = 64
_SEED = 0


@dataclass
class _Drawn:
    """Norms of drawn rows by layer, and the lengths of the samples that they come from."""

    norms: dict[int, list[np.ndarray]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    shards: int = 0


def plot_runs(runs: Sequence[Run], output: str | Path) -> None:
    """Writes a picture (PNG, or what the ending says) of all `runs` together.

    Norms and lengths come from at most MAX_SHARDS shards, drawn by a fixed seed, as the title says; the statistics of
    channels from all rows. Raises ConfigError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plot needs matplotlib: pip install matplotlib") from error
    drawn = _draw(runs)
    stats = next(iter(merged_stats(runs).values()))
    figure = Figure(figsize=(10, 8), dpi=100, layout="constrained")
    norms, lengths, shares, massive = figure.subplots(2, 2).flat
    _plot_norms(norms, drawn)
    _plot_lengths(lengths, drawn)
    _plot_shares(shares, [run.metadata for run in runs if run.metadata])
    _plot_massive(massive, stats)
    total = sum(len(run.shards) for run in runs)
    figure.suptitle(
        f"{_name(runs)}\n{stats.count:,} rows; norms and lengths from {drawn.shards} of {total} shards"
    )
    figure.savefig(output)


def _name(runs: Sequence[Run]) -> str:
    if runs[0].metadata is None:
        return runs[0].where
    kind, model = runs[0].kinds[0], runs[0].metadata["model"]["name"]
    return f"{kind}, {model.rstrip('/').rpartition('/')[2] or model}"


def _draw(runs: Sequence[Run]) -> _Drawn:
    shards = [(run, name) for run in runs for name in run.shards]
    rng = np.random.default_rng(_SEED)
    chosen = rng.permutation(len(shards))[:MAX_SHARDS]
    drawn = _Drawn(shards=len(chosen))
    for number in sorted(chosen):
        for sample in shard_samples(*shards[number]):
            n_rows = len(sample["token_ids"])
            drawn.lengths.append(n_rows)
            rows = rng.choice(n_rows, min(_ROWS_A_SAMPLE, n_rows), replace=False)
            for layer, values in sample["activations"].items():
                if layer != EMBEDDING:
                    norms = np.linalg.norm(values[rows].astype(np.float32), axis=1)
                    drawn.norms.setdefault(layer, []).append(norms)
    return drawn


def _plot_norms(axes: Any, drawn: _Drawn) -> None:
    layers = sorted(drawn.norms)
    low, median, high = np.transpose(
        [np.percentile(np.concatenate(drawn.norms[layer]), [5, 50, 95]) for layer in layers]
    )
    axes.fill_between(layers, low, high, alpha=0.3, label="5 to 95 %")
    axes.plot(layers, median, marker="o", label="median")
    scale = "log" if high.max() > 20 * low.min() else "linear"
    axes.set(title="Norm of a row", xlabel="layer", ylabel="Euclidean norm", yscale=scale)
    _whole_ticks(axes.xaxis)
    axes.legend()


def _plot_lengths(axes: Any, drawn: _Drawn) -> None:
    axes.hist(drawn.lengths, bins=min(40, max(5, len(set(drawn.lengths)) // 2)))
    axes.set(title="Length of samples", xlabel="kept tokens", ylabel="samples")
    _whole_ticks(axes.yaxis)


def _plot_shares(axes: Any, metadata: Sequence[dict[str, Any]]) -> None:
    def total(key: str) -> int:
        return sum(each["totals"][key] for each in metadata)

    shortened = total("shortened") + total("truncated")
    parts = {
        "whole": total("samples") - shortened,
        "lost examples": total("shortened"),
        "cut": total("truncated"),
        "skipped": total("skipped"),
    }
    lines = max(sum(parts.values()), 1)
    bars = axes.barh(list(parts), [100 * count / lines for count in parts.values()])
    axes.bar_label(bars, [f" {100 * count / lines:.1f} % ({count:,})" for count in parts.values()])
    axes.invert_yaxis()
    axes.set(title="Stream lines", xlabel="% of lines", xlim=(0, 135))
    axes.set_xticks(range(0, 101, 20))


def _plot_massive(axes: Any, stats: KindStats) -> None:
    ratio_CD = stats.max_abs_CD / stats.median_rms_C[:, None]
    axes.plot(stats.layers, ratio_CD.max(axis=1), marker="o", label="largest channel")
    axes.axhline(MASSIVE, linestyle="--", color="gray", label=f"massive: {MASSIVE:g} x median")
    for layer, channel, ratio in _massive(stats, ratio_CD):
        axes.annotate(f" {channel}", (layer, ratio), fontsize="small")
    axes.set(
        title="Massive channels",
        xlabel="layer",
        ylabel="largest |value| / median channel's rms",
        yscale="log",
    )
    _whole_ticks(axes.xaxis)
    axes.legend()


def _massive(stats: KindStats, ratio_CD: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """The largest channel of each layer that has a massive one."""
    for layer, ratio_D in zip(stats.layers, ratio_CD, strict=True):
        if ratio_D.max() > MASSIVE:
            yield layer, int(ratio_D.argmax()), float(ratio_D.max())


def _whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
