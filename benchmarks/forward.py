"""Forward pass of the 0.5B shape: ours, Hugging Face eager, and the measured matrix-product peak.

    python benchmarks/forward.py [--rows 4] [--length 512] [--rounds 5]

Needs torch and transformers (tests/requirements.txt). float32 on the CPU.
"""

import argparse
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from common import interleave, report

from qwen_jax.model.capture import Capture
from qwen_jax.model.config import Qwen2Config, read_config
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.weights import LAYER_TENSORS, load_model, open_checkpoint
from tests.hf_reference import PUBLISHED, load_reference, make_reference, save_reference

PEAK_SIZE = (2048, 896, 4864)


def useful_flops(config: Qwen2Config, rows: int, length: int) -> float:
    """Multiply-adds (times 2) of the matrix products and of causal attention, without masked products."""
    dims = config.dims
    weights = sum(np.prod([dims[c] for c in axes.replace(" ", "")]) for _, axes in LAYER_TENSORS.values())
    attention = 2 * (length + 1) / 2 * config.num_heads * config.head_dim
    return 2.0 * rows * length * config.num_layers * (weights + attention)


def matrix_product():
    """The largest product of a layer, alone: what the machine can do at best."""
    M, K, N = PEAK_SIZE
    a = jnp.asarray(np.random.default_rng(0).normal(size=(M, K)), jnp.float32)
    b = jnp.asarray(np.random.default_rng(1).normal(size=(N, K)), jnp.float32)
    product = jax.jit(lambda a, b: jnp.einsum("mk,nk->mn", a, b))
    return lambda: [product(a, b).block_until_ready() for _ in range(10)], 10 * 2.0 * M * K * N


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=PUBLISHED, default="0.5B")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_reference(make_reference(*PUBLISHED[args.size]), folder, "bfloat16")
        config, mesh = read_config(folder), make_mesh()
        model = load_model(open_checkpoint(folder), config, config.num_layers, jnp.float32, mesh)
        theirs = load_reference(folder)
    step = Capture(model, range(config.num_layers), ["residual"], "float32", mesh)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (args.rows, args.length), np.int32)
    torch_tokens = torch.from_numpy(tokens.astype(np.int64))
    product, product_flops = matrix_product()

    def hugging_face() -> None:
        with torch.no_grad():
            theirs.model(torch_tokens, output_hidden_states=True)

    def ours() -> None:
        np.asarray(step(tokens).taps["residual"].activations_CBRD)

    cases = {"ours": ours, "hugging_face": hugging_face, "peak": product}
    seconds = interleave(cases, args.rounds)
    flops = useful_flops(config, args.rows, args.length)
    peak = product_flops / seconds["peak"]
    report(
        f"Forward pass, {args.size} shape, {args.rows} x {args.length} tokens, float32, all layers kept",
        [
            (
                "ours",
                f"{tokens.size / seconds['ours']:.0f} tokens/s, {flops / seconds['ours'] / 1e9:.0f} GFLOP/s",
            ),
            ("Hugging Face eager", f"{tokens.size / seconds['hugging_face']:.0f} tokens/s"),
            ("matrix product " + " x ".join(map(str, PEAK_SIZE)), f"{peak / 1e9:.0f} GFLOP/s"),
            ("ours / Hugging Face", f"{seconds['hugging_face'] / seconds['ours']:.2f}"),
            ("ours / matrix product peak", f"{flops / seconds['ours'] / peak:.2f}"),
        ],
    )


if __name__ == "__main__":
    main()
