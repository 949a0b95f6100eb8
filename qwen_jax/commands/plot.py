"""Draws one picture of a run: norms by layer, lengths of samples, shortened samples, massive channels. Needs
matplotlib (pip install matplotlib). Of several stored kinds it draws the main one, or --kind.

  python -m qwen_jax plot activations --output activations.png
  python -m qwen_jax plot activations --kind mlp --output mlp.png
"""

from argparse import Namespace

from qwen_jax.cli import FlagParser, say
from qwen_jax.commands.arguments import add_kind, add_paths
from qwen_jax.reading.plot import plot_runs
from qwen_jax.reading.runs import local_output, open_runs


def add_flags(parser: FlagParser) -> None:
    add_paths(parser)
    add_kind(parser)
    parser.add_argument("-o", "--output", required=True, help="picture to write: .png, .pdf or .svg")


def run(args: Namespace) -> int:
    output = local_output(args.output, "--output", (".png", ".pdf", ".svg"))
    plot_runs([run for path in args.paths for run in open_runs(path)], output, args.kind)
    say(f"wrote {output}")
    return 0
