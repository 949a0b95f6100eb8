"""One picture of a run: norms by layer, sample lengths, shortened samples, massive channels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.bar import with_bar
from qwen_jax.errors import ConfigError, UsageError
from qwen_jax.reading.merged_stats import merged_stats
from qwen_jax.reading.runs import Run
from qwen_jax.reading.samples import shard_samples
from qwen_jax.shards import EMBEDDING
from qwen_jax.shards.statistics import MASSIVE, KindStats

MAX_SHARDS = 8
_ROWS_A_SAMPLE = 64
_SEED = 0
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "lines.markersize": 3,
    "lines.linewidth": 1.2,
}


@dataclass
class _Drawn:
    """Norms of drawn rows by layer, and the lengths of the samples that they come from."""

    norms: dict[int, list[np.ndarray]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    shards: int = 0


def plot_runs(runs: Sequence[Run], output: str | Path, kind: str | None = None) -> None:
    """Writes a picture (PNG, or what the ending says) of all `runs` together.

    Norms and lengths come from at most MAX_SHARDS shards, drawn by a fixed seed, as the title says; the statistics of
    channels from all rows. kind: which of several stored kinds; None is the main one. Raises ConfigError where
    matplotlib is missing, UsageError for a kind that is not stored.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plot needs matplotlib: pip install matplotlib") from error
    merged = merged_stats(runs)
    kind = kind or next(iter(merged))
    if kind not in merged:
        raise UsageError(f"kind {kind} is not stored; there is {', '.join(merged)}")
    stats, drawn = merged[kind], _draw(runs, kind)
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 5.6), dpi=150, layout="constrained")
        norms, lengths, shares, massive = figure.subplots(2, 2).flat
        _plot_norms(norms, drawn, kind)
        _plot_lengths(lengths, drawn, runs)
        _plot_shares(shares, runs)
        _plot_massive(massive, stats, kind)
        total = sum(len(run.shards) for run in runs)
        figure.suptitle(
            f"{_about(runs)}, {kind}\n"
            f"{stats.count:,} rows; norms and lengths from {drawn.shards} of {total} shards",
            fontsize=10,
        )
        figure.savefig(output)


def _about(runs: Sequence[Run]) -> str:
    """Model (as the hub has it, or the last two parts of a folder's path), dtype and workers; else where shards are."""
    workers = "1 worker" if len(runs) == 1 else f"{len(runs)} workers"
    described = [run.metadata for run in runs if run.metadata is not None]
    name = described[0]["model"]["name"] if described else runs[0].where
    short = "/".join(name.rstrip("/").split("/")[-2:])
    dtypes = dict.fromkeys(metadata["activation_dtype"] for metadata in described)
    return ", ".join([short, *dtypes, workers])


def _draw(runs: Sequence[Run], kind: str) -> _Drawn:
    shards = [(run, name) for run in runs for name in run.shards]
    rng = np.random.default_rng(_SEED)
    chosen = rng.permutation(len(shards))[:MAX_SHARDS]
    drawn = _Drawn(shards=len(chosen))
    for number in with_bar(sorted(chosen), len(chosen)):
        run, name = shards[number]
        for sample in shard_samples(run, name, kind=kind):
            n_rows = len(sample["token_ids"])
            drawn.lengths.append(n_rows)
            rows = rng.choice(n_rows, min(_ROWS_A_SAMPLE, n_rows), replace=False)
            for layer, values in sample["activations"].items():
                if layer != EMBEDDING:
                    norms = np.linalg.norm(values[rows].astype(np.float32), axis=1)
                    drawn.norms.setdefault(layer, []).append(norms)
    return drawn


def _plot_norms(axes: Any, drawn: _Drawn, kind: str) -> None:
    layers = sorted(drawn.norms)
    low, median, high = np.transpose(
        [np.percentile(np.concatenate(drawn.norms[layer]), [5, 50, 95]) for layer in layers]
    )
    axes.fill_between(layers, low, high, alpha=0.3, label="5 to 95 %")
    axes.plot(layers, median, marker="o", label="median")
    scale = "log" if high.max() > 20 * low.min() else "linear"
    axes.set(title=f"Norm of a row, {kind}", xlabel="layer", ylabel="Euclidean norm", yscale=scale)
    _whole_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.legend()


def _plot_lengths(axes: Any, drawn: _Drawn, runs: Sequence[Run]) -> None:
    axes.hist(drawn.lengths, bins=min(40, max(5, len(set(drawn.lengths)) // 2)))
    axes.set(title="Length of samples", xlabel="kept tokens", ylabel="samples")
    axes.margins(x=0.05, y=0.3)  # the legend stands above the bars
    limits = {run.metadata["fingerprint"]["max_seq_length"] for run in runs if run.metadata is not None}
    for limit in sorted(limits):
        axes.axvline(limit, linestyle="--", color="gray", label=f"max_seq_length {limit:,}")
    if limits:
        axes.legend(loc="upper left")
    _whole_ticks(axes.xaxis)
    _whole_ticks(axes.yaxis)


def _plot_shares(axes: Any, runs: Sequence[Run]) -> None:
    """Of those runs that have metadata; of a whole run even where one shard of it was opened."""
    totals = [run.ledger.totals() for run in runs if run.ledger]
    axes.set(title=f"Stream lines{_of_which(runs, len(totals))}")
    if totals:
        _plot_bars(axes, totals)
        return
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "not recorded: no metadata.json", ha="center", transform=axes.transAxes)


def _of_which(runs: Sequence[Run], recorded: int) -> str:
    if 0 < recorded < len(runs):
        return f" of {recorded} of {len(runs)} workers"
    return " of the whole run" if recorded and any(run.is_part for run in runs) else ""


def _plot_bars(axes: Any, totals: Sequence[dict[str, int]]) -> None:
    def total(key: str) -> int:
        return sum(each[key] for each in totals)

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
    axes.margins(y=0.15)
    axes.set(xlabel="% of lines", xlim=(0, 150))
    axes.set_xticks(range(0, 101, 20))


def _plot_massive(axes: Any, stats: KindStats, kind: str) -> None:
    ratio_CD = stats.max_abs_CD / stats.median_rms_C[:, None]
    axes.plot(stats.layers, ratio_CD.max(axis=1), marker="o", label="largest value")
    axes.axhline(MASSIVE, linestyle="--", color="gray", label=f"massive: {MASSIVE:g} x median")
    for layer, channel, ratio in _massive(stats, ratio_CD):
        axes.annotate(f" {channel}", (layer, ratio), fontsize="small")
    axes.set(
        title=f"Massive channels, {kind}",
        xlabel="layer",
        ylabel="largest |value| / median rms",
        yscale="log",
    )
    _whole_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.legend()


def _massive(stats: KindStats, ratio_CD: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """The largest channel of each layer that has a massive one."""
    for layer, ratio_D in zip(stats.layers, ratio_CD, strict=True):
        if ratio_D.max() > MASSIVE:
            yield layer, int(ratio_D.argmax()), float(ratio_D.max())


def _whole_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _plain_ticks(axis: Any) -> None:
    """1,000 and not 10^3, on a log scale at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
