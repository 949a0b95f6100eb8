"""Draws one picture of a run: norms by layer, lengths of samples, shortened samples, massive channels. Needs
matplotlib (pip install matplotlib).

  python -m qwen_jax plot activations --output activations.png
"""

from argparse import Namespace

from qwen_jax.cli import FlagParser
from qwen_jax.reading.plot import plot_runs
from qwen_jax.reading.runs import open_runs


def add_flags(parser: FlagParser) -> None:
    parser.add_argument(
        "paths", nargs="+", help="worker's folders, folders of these, shards, or gs:// addresses"
    )
    parser.add_argument("-o", "--output", required=True, help="picture to write: .png, .pdf or .svg")


def run(args: Namespace) -> int:
    plot_runs([run for path in args.paths for run in open_runs(path)], args.output)
    print(f"wrote {args.output}")
    return 0
