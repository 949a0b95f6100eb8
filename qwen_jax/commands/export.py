"""Writes shards in another tool's format, one layer at a time; started again after an interruption it goes on.

safetensors: a folder a layer, a file a shard. npy: one memory-mappable array a layer. hf_dataset: a Hugging Face
dataset a layer, which SAELens reads as its cached activations. A dataset card (README.md) comes with each.

  python -m qwen_jax export activations --to hf_dataset --output sae_data --layers 11
  python -m qwen_jax export gs://your-bucket/activations --to npy --output probe_data --layers 5 11
"""

import itertools
from argparse import Namespace

from qwen_jax.cli import FlagParser, positive_int, say
from qwen_jax.commands.arguments import add_kind, add_layers, add_path
from qwen_jax.reading.export import FORMATS, export


def add_flags(parser: FlagParser) -> None:
    add_path(parser)
    parser.flag("to", "format", choices=tuple(FORMATS), required=True)
    parser.flag("output", "folder to write", required=True)
    add_layers(parser)
    add_kind(parser)
    parser.flag("context_size", "rows of an entry of hf_dataset", default=256, type=positive_int)


def run(args: Namespace) -> int:
    layers = None if args.layers is None else list(itertools.chain(*args.layers))
    done = export(
        args.path, args.to, args.output, layers=layers, kind=args.kind, context_size=args.context_size
    )
    kept = f", {done.parts_kept} of {done.parts} parts were there already" if done.parts_kept else ""
    say(f"{done.output}: {len(done.layers)} layers of {done.rows:,} rows as {args.to}{kept}")
    return 0
