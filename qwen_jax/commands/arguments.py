"""Arguments that several commands take."""

from argparse import ArgumentTypeError
from typing import Any

from qwen_jax.cli import FlagParser, non_negative_int
from qwen_jax.ledger.schema import MOST_LAYERS
from qwen_jax.shards import EMBEDDING, KIND_KEYS


def add_path(parser: FlagParser, **kwargs: Any) -> None:
    """One place, as `args.path`."""
    parser.add_argument("path", help="shard, worker's folder, folder of these, or gs:// address", **kwargs)


def add_paths(parser: FlagParser) -> None:
    """One or more places, as `args.paths`."""
    parser.add_argument(
        "paths", nargs="+", help="shards, worker's folders, folders of these, or gs:// addresses"
    )


def add_kind(parser: FlagParser) -> None:
    """Which kind of activations, as `args.kind`; None is the main one."""
    parser.flag("kind", "which of several stored kinds; without it the main one", choices=KIND_KEYS)


def layer_name(text: str) -> int | str:
    """An argparse type: a layer's index, or the embedding."""
    return text if text == EMBEDDING else non_negative_int(text)


def add_layers(parser: FlagParser) -> None:
    """Several layers, as `args.layers`: a list of lists; None is all."""
    parser.flag("layers", f"layers, as 3 7-11, or {EMBEDDING}; without it all", nargs="+", type=layer_range)


def layer_range(text: str) -> list[int | str]:
    """An argparse type: one layer, or several as 7-11."""
    first, dash, last = text.partition("-")
    if not dash:
        return [layer_name(text)]
    between = range(non_negative_int(first), non_negative_int(last) + 1)
    if not 0 < len(between) <= MOST_LAYERS:
        raise ArgumentTypeError(f"layers from a lower to a higher one, as 7-11, got {text!r}")
    return list(between)
