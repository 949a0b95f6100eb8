"""Forward pass of the 0.5B shape: ours, Hugging Face, and the measured matrix-product peak.

    python benchmarks/forward.py [--layers 4] [--length 2048 16384] [--tokens 16384] [--rounds 3]

Samples of each length, `--tokens` in all, through steps as the worker makes them, up to samples on the host. Hugging
Face takes them one by one, with eager attention, but beyond 4,096 tokens with sdpa, since eager scores of 16,384
tokens take 15 GB a layer. Needs torch and transformers (tests/requirements.txt). float32.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import interleave, load_capture, make_program, plain_sample, published, report, save_model

from qwen_jax.data.steps import lay_into_steps
from qwen_jax.model.config import Qwen2Config
from qwen_jax.model.published import PUBLISHED
from qwen_jax.model.weights import LAYER_TENSORS
from qwen_jax.run.pipeline import captured_samples
from tests.hf_reference import load_reference

PEAK_SIZE = (2048, 896, 4864)
LONGEST_EAGER = 4096


def useful_flops(config: Qwen2Config, length: int) -> float:
    """Of a token: multiply-adds (times 2) of the matrix products and of causal attention, (length + 1) / 2 keys."""
    dims = config.dims
    weights = sum(np.prod([dims[c] for c in axes.replace(" ", "")]) for _, axes in LAYER_TENSORS.values())
    attention = 2 * (length + 1) / 2 * config.num_heads * config.head_dim
    return 2.0 * config.num_layers * (weights + attention)


def matrix_product() -> tuple[Callable[[], None], float]:
    """The largest product of a layer, alone, ten times: what the machine can do at best; and its operations."""
    M, K, N = PEAK_SIZE
    a = jnp.asarray(np.random.default_rng(0).normal(size=(M, K)), jnp.float32)
    b = jnp.asarray(np.random.default_rng(1).normal(size=(N, K)), jnp.float32)
    product = jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b))

    def ten() -> None:
        for _ in range(10):
            product(a, b).block_until_ready()

    return ten, 10 * 2.0 * M * K * N


def our_case(model: Path, length: int, tokens: np.ndarray) -> Callable[[], None]:
    program = make_program(model, max(length, 2048))
    capture = load_capture(program, model)
    steps = list(lay_into_steps([plain_sample(i, ids) for i, ids in enumerate(tokens)], program.shape))

    def ours() -> None:
        for _ in captured_samples(steps, capture):
            pass

    return ours


def their_case(model: torch.nn.Module, length: int, tokens: np.ndarray) -> Callable[[], None]:
    samples = torch.from_numpy(tokens.astype(np.int64))

    def hugging_face() -> None:
        model.set_attn_implementation("eager" if length <= LONGEST_EAGER else "sdpa")
        with torch.no_grad():
            for sample in samples:
                model(sample[None], output_hidden_states=True)

    return hugging_face


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=PUBLISHED, default="0.5B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    product, product_flops = matrix_product()
    cases: dict[str, Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder), published(args.size, args.layers))
        config = make_program(model, 2048).config
        theirs = load_reference(folder).model
        for length in args.length:
            shape = (max(1, args.tokens // length), length)
            tokens = np.random.default_rng(2).integers(0, config.vocab_size, shape, np.int32)
            cases[f"ours {length}"] = our_case(model, length, tokens)
            cases[f"theirs {length}"] = their_case(theirs, length, tokens)
            cases[f"peak {length}"] = product
    seconds = interleave(cases, args.rounds)
    rows = []
    for length in args.length:
        ours, other, peak = (seconds[f"{name} {length}"] for name in ("ours", "theirs", "peak"))
        count = max(1, args.tokens // length) * length
        flops, peak_flops = count * useful_flops(config, length) / ours, product_flops / peak
        attention = "eager" if length <= LONGEST_EAGER else "sdpa"
        rows += [
            (f"{length}: ours", f"{count / ours:,.0f} tokens/s, {flops / 1e9:.0f} GFLOP/s"),
            (f"{length}: Hugging Face {attention}", f"{count / other:,.0f} tokens/s"),
            (
                f"{length}: matrix product {' x '.join(map(str, PEAK_SIZE))}",
                f"{peak_flops / 1e9:.0f} GFLOP/s",
            ),
            (f"{length}: ours / Hugging Face", f"{other / ours:.2f}"),
            (f"{length}: ours / matrix product peak", f"{flops / peak_flops:.2f}"),
        ]
    report(f"Forward pass, {args.size} shape, {args.layers} layers, float32, all layers kept", rows)


if __name__ == "__main__":
    main()
