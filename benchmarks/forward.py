"""Forward pass of the 0.5B shape: ours, Hugging Face, and the measured matrix-product peak.

    python benchmarks/forward.py [--layers 4] [--length 2048 16384] [--tokens 16384] [--rounds 3] [--dtype bfloat16]
        [--accelerator h100] [--skip_hugging_face] [--shards]

Samples of each length, `--tokens` in all, through steps as the worker makes them, up to samples on the host. Hugging
Face takes them one by one on the CPU, in float32, with eager attention, but beyond 4,096 tokens with sdpa, since eager
scores of 16,384 tokens take 15 GB a layer. "Device alone" runs the same steps and copies nothing: what is missing from
it to the whole is time in which the device idles. --shards goes on to durable shards on the local disk, as a worker
does. --accelerator, a name that `plan` knows, adds the share of the maker's figure. Needs tests/requirements.txt.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import (
    device_to_host,
    interleave,
    load_capture,
    make_program,
    on_device,
    plain_sample,
    published,
    report,
    save_model,
)

from qwen_jax.accelerators import accelerator
from qwen_jax.data.steps import lay_into_steps
from qwen_jax.ledger.metadata import Ledger, RunIdentity
from qwen_jax.model.config import ModelConfig
from qwen_jax.model.published import PUBLISHED
from qwen_jax.model.weights import EMBEDDING, expected_shapes
from qwen_jax.run.background import BackgroundCommitter
from qwen_jax.run.commit import Committer, Fence
from qwen_jax.run.memory import reuse_freed_memory
from qwen_jax.run.pipeline import captured_samples, filled_shards
from qwen_jax.run.places import Places
from tests.hf_reference import load_reference

PEAK_SIZE = {"cpu": (1024, 896, 4864)}
PEAK_SIZE_OF_ACCELERATORS = (8192, 8192, 8192)
LONGEST_EAGER = 4096
SHARD_BYTES = 1 << 30


def useful_flops(config: ModelConfig, length: int) -> float:
    """Of a token: multiply-adds (times 2) of the matrix products and of causal attention, (length + 1) / 2 keys."""
    weights = sum(math.prod(shape) for name, shape in expected_shapes(config, 1).items() if name != EMBEDDING)
    attention = 2 * (length + 1) / 2 * config.num_heads * config.head_dim
    return 2.0 * config.num_layers * (weights + attention)


def peak_size() -> tuple[int, int, int]:
    return PEAK_SIZE.get(jax.default_backend(), PEAK_SIZE_OF_ACCELERATORS)


def matrix_product(dtype: str) -> tuple[Callable[[], None], float]:
    """A product, alone, ten times: what the machine can do at best; and its operations. On a CPU the largest one of a
    step, on an accelerator one that fills it."""
    M, K, N = peak_size()
    a = jnp.asarray(np.random.default_rng(0).normal(size=(M, K)), dtype)
    b = jnp.asarray(np.random.default_rng(1).normal(size=(N, K)), dtype)
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b, precision=precision))

    def ten() -> None:
        for _ in range(10):
            product(a, b).block_until_ready()

    return ten, 10 * 2.0 * M * K * N


def our_cases(
    model: Path, length: int, tokens: np.ndarray, dtype: str, folder: Path | None
) -> dict[str, Callable[[], None]]:
    """folder: where shards go; None for none."""
    program = make_program(model, max(length, 2048), dtype=dtype)
    capture = load_capture(program, model)
    steps = list(lay_into_steps([plain_sample(i, ids) for i, ids in enumerate(tokens)], program.shape))

    def ours() -> None:
        for _ in captured_samples(steps, capture):
            pass

    def to_shards() -> None:
        folder.mkdir(exist_ok=True)
        places = Places(folder, folder / "checkpoint.json", "checkpoint.json", None)
        run = RunIdentity(0, "", "", {}, {"activation_types": ["residual"]})
        committer = Committer(run, places, program.layers, Ledger(), Fence())
        with BackgroundCommitter(committer) as background:
            for shard in filled_shards(captured_samples(steps, capture), SHARD_BYTES, NothingSkipped()):
                background.add(shard)
            background.wait()

    cases = {f"ours {length}": ours, f"alone {length}": lambda: on_device(capture, steps)}
    return cases | ({f"shards {length}": to_shards} if folder else {})


class NothingSkipped:
    """What filled_shards asks of a reader."""

    def take_skipped(self, before: int) -> list:
        return []


def their_case(model: torch.nn.Module, length: int, tokens: np.ndarray) -> Callable[[], None]:
    samples = torch.from_numpy(tokens.astype(np.int64))

    def hugging_face() -> None:
        model.set_attn_implementation("eager" if length <= LONGEST_EAGER else "sdpa")
        with torch.no_grad():
            for sample in samples:
                model(sample[None], output_hidden_states=True)

    return hugging_face


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=PUBLISHED, default="0.5B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--accelerator", help="share of the maker's figure too", type=accelerator)
    parser.add_argument("--skip_hugging_face", action="store_true")
    parser.add_argument("--shards", action="store_true", help="up to durable shards too")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    reuse_freed_memory()  # as a worker does
    product, product_flops = matrix_product(args.dtype)
    cases: dict[str, Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder) / "model", published(args.size, args.layers))
        config = make_program(model, 2048).config
        theirs = None if args.skip_hugging_face else load_reference(model).model
        shards = Path(folder) / "shards" if args.shards else None
        for length in args.length:
            shape = (max(1, args.tokens // length), length)
            tokens = np.random.default_rng(2).integers(0, config.vocab_size, shape, np.int32)
            cases |= our_cases(model, length, tokens, args.dtype, shards)
            if theirs is not None:
                cases[f"theirs {length}"] = their_case(theirs, length, tokens)
            cases[f"peak {length}"] = product
        seconds = interleave(cases, args.rounds)
    rows = [row for length in args.length for row in rows_of(args, config, length, seconds, product_flops)]
    kind = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    title = f"Forward pass, {args.size} shape, {args.layers} layers, {args.dtype}, all layers kept, {kind}"
    report(title, [*rows, ("device to host", device_to_host())])


def rows_of(
    args: argparse.Namespace,
    config: ModelConfig,
    length: int,
    seconds: dict[str, float],
    product_flops: float,
) -> Iterator[tuple[str, str]]:
    ours, alone = seconds[f"ours {length}"], seconds[f"alone {length}"]
    count = max(1, args.tokens // length) * length
    useful, peak = count * useful_flops(config, length), product_flops / seconds[f"peak {length}"]
    devices = jax.local_device_count()
    yield f"{length}: ours", f"{count / ours:,.0f} tokens/s, {useful / ours / 1e9:,.0f} GFLOP/s"
    yield f"{length}: device alone", f"{count / alone:,.0f} tokens/s, {useful / alone / 1e9:,.0f} GFLOP/s"
    yield f"{length}: device idle share, to samples on the host", f"{1 - alone / ours:.2f}"
    if args.shards:
        shards = seconds[f"shards {length}"]
        yield f"{length}: to durable shards", f"{count / shards:,.0f} tokens/s"
        yield f"{length}: device idle share, to durable shards", f"{1 - alone / shards:.2f}"
    yield (
        f"{length}: matrix product {' x '.join(map(str, peak_size()))}, one device",
        f"{peak / 1e9:,.0f} GFLOP/s",
    )
    yield f"{length}: device alone / matrix product peak", f"{useful / alone / peak / devices:.2f}"
    if args.accelerator:
        flops = args.accelerator.chip.flops
        yield f"{length}: device alone / the maker's bfloat16 peak", f"{useful / alone / flops / devices:.2f}"
    yield f"{length}: ours / matrix product peak", f"{useful / ours / peak / devices:.2f}"
    if not args.skip_hugging_face:
        other, attention = seconds[f"theirs {length}"], "eager" if length <= LONGEST_EAGER else "sdpa"
        yield f"{length}: Hugging Face {attention}", f"{count / other:,.0f} tokens/s"
        yield f"{length}: ours / Hugging Face", f"{other / ours:.2f}"


if __name__ == "__main__":
    main()
