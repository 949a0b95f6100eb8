"""Merges the statistics of shards and workers into one stats.safetensors, and prints them by layer. Where a run
has none, they are computed from its shards.

  python -m qwen_jax stats activations
  python -m qwen_jax stats gs://your-bucket/activations --output stats.safetensors
"""

from argparse import Namespace
from pathlib import Path

from qwen_jax.cli import FlagParser
from qwen_jax.reading.runs import open_runs
from qwen_jax.reading.statistics import merged_stats
from qwen_jax.shards.statistics import stats_bytes
from qwen_jax.storage.local import atomic_write


def add_flags(parser: FlagParser) -> None:
    parser.add_argument(
        "paths", nargs="+", help="worker's folders, folders of these, shards, or gs:// addresses"
    )
    parser.flag("output", "file to write")


def run(args: Namespace) -> int:
    stats = merged_stats([run for path in args.paths for run in open_runs(path)])
    print(f"{'kind':<10} {'layer':>9} {'rows':>12} {'mean norm':>10} {'max norm':>10}  massive channels")
    for kind, entry in stats.items():
        for layer, line in entry.summary().items():
            channels = ", ".join(map(str, line["massive_channels"])) or "none"
            norms = f"{line['norm_mean']:>10.4g} {line['norm_max']:>10.4g}"
            print(f"{kind:<10} {layer:>9} {line['count']:>12,} {norms}  {channels}")
    if args.output:
        with atomic_write(Path(args.output)) as file:
            file.write(stats_bytes(stats))
    return 0
