"""Merges the statistics of shards and workers into one stats.safetensors, and prints them by layer. Where a run
has none, they are computed from its shards.

  python -m qwen_jax stats activations
  python -m qwen_jax stats gs://your-bucket/activations --output stats.safetensors
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from qwen_jax.cli import FlagParser, say
from qwen_jax.commands.arguments import add_paths
from qwen_jax.errors import UsageError
from qwen_jax.reading.merged_stats import groups_alike, merged_stats
from qwen_jax.reading.runs import local_output, open_runs
from qwen_jax.shards.statistics import Stats, stats_bytes
from qwen_jax.storage.atomic import atomic_write


def add_flags(parser: FlagParser) -> None:
    add_paths(parser)
    parser.flag("output", "file to write")


def run(args: Namespace) -> int:
    output = local_output(args.output, "--output", (".safetensors",)) if args.output else None
    groups = groups_alike([run for path in args.paths for run in open_runs(path)])
    if output is not None and len(groups) > 1:
        raise UsageError(
            "--output takes the statistics of runs with the same kinds, layers and model; name those alone"
        )
    say(f"{'kind':<10} {'layer':>9} {'rows':>12} {'mean norm':>10} {'max norm':>10}  massive channels")
    for group in groups:
        stats = merged_stats(group)
        for line in _lines(stats):
            say(line)
        if output is not None:
            with atomic_write(output) as file:
                file.write(stats_bytes(stats))
    return 0


def _lines(stats: Stats) -> Iterator[str]:
    for kind, entry in stats.items():
        for layer, line in entry.summary().items():
            channels = ", ".join(map(str, line["massive_channels"])) or "none"
            norms = f"{line['norm_mean']:>10.4g} {line['norm_max']:>10.4g}"
            yield f"{kind:<10} {layer:>9} {line['count']:>12,} {norms}  {channels}{_loss(line)}"


def _loss(line: dict[str, Any]) -> str:
    """Of quantised rows what was lost."""
    if "relative_error" not in line:
        return ""
    return (
        f"; lost: relative error {line['relative_error']:.2g}, variance {line['unexplained_variance']:.2g}, mean "
        f"cosine {line['cosine']:.7f}, at most {line['max_error']:.2g} (channel {line['max_error_channel']})"
    )
