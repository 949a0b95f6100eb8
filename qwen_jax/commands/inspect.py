"""Shows what is in a shard or in runs; with --sample, one sample token by token.

python -m qwen_jax inspect activations
python -m qwen_jax inspect activations/worker_0/shard_0001.pkl.gz
python -m qwen_jax inspect activations/worker_0 --sample 12 --layer 5
"""

from argparse import Namespace
from typing import Any

from qwen_jax.cli import FlagParser, non_negative_int
from qwen_jax.errors import ConfigError, UsageError
from qwen_jax.reading.inspect import describe, find_sample, token_table
from qwen_jax.reading.runs import Run, open_runs


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("path", help="shard, worker's folder, folder of these, or gs:// address")
    parser.flag("sample", "sample_idx of a sample to show", type=non_negative_int)
    parser.flag(
        "layer", "layer to show it at; without it the first one that is stored", type=non_negative_int
    )
    parser.flag("tokenizer", "folder or Hugging Face id; without it that of the run's model")


def run(args: Namespace) -> int:
    runs = open_runs(args.path)
    if args.sample is None:
        lines = (line for run in runs for line in describe(run))
    else:
        layer = _first_layer(runs) if args.layer is None else args.layer
        found, sample = find_sample(runs, args.sample, layer)
        lines = token_table(sample, layer, _tokenizer(args.tokenizer, found))
    for line in lines:
        print(line)
    return 0


def _first_layer(runs: list[Run]) -> int:
    if runs[0].metadata is None:
        raise UsageError("--sample in a shard without metadata.json needs --layer")
    return runs[0].metadata["layers"][0]


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
        print(f"without the tokens' text: {error}; pass --tokenizer")
        return None
