"""Shows what is in a shard or in runs; with --sample, one sample token by token.

python -m qwen_jax inspect activations
python -m qwen_jax inspect activations/worker_0/shard_0001.pkl.gz
python -m qwen_jax inspect activations/worker_0 --sample 12 --layer 5
"""

from argparse import Namespace
from typing import Any

from qwen_jax.cli import FlagParser, non_negative_int, say
from qwen_jax.commands.arguments import add_kind, add_path, layer_name
from qwen_jax.errors import ConfigError
from qwen_jax.reading.inspect import describe, find_sample, token_table
from qwen_jax.reading.runs import Run, open_runs
from qwen_jax.shards import EMBEDDING


def add_flags(parser: FlagParser) -> None:
    add_path(parser)
    parser.flag("sample", "sample_idx of a sample to show", type=non_negative_int)
    parser.flag(
        "layer",
        f"layer to show it at, or {EMBEDDING}; without it the first one that is stored",
        type=layer_name,
    )
    add_kind(parser)
    parser.flag("tokenizer", "folder or Hugging Face id; without it that of the run's model")


def run(args: Namespace) -> int:
    runs = open_runs(args.path)
    if args.sample is None:
        lines = describe(runs)
    else:
        found, sample = find_sample(runs, args.sample, args.layer, args.kind)
        lines = token_table(sample, _tokenizer(args.tokenizer, found))
    for line in lines:
        say(line)
    return 0


def _tokenizer(name: str | None, run: Run) -> Any:
    """The tokenizer, or None where the run's own cannot be had."""
    from qwen_jax.data.prompts import load_tokenizer

    if name is not None:
        return load_tokenizer(name)
    if run.metadata is None:
        return None
    model = run.metadata["model"]
    try:
        return load_tokenizer(model["name"], model["revision"])
    except ConfigError as error:
        say(f"without the tokens' text: {error}; pass --tokenizer")
        return None
