"""What a run loses in each stored dtype, and what that does to a sparse autoencoder trained on its rows.

    python benchmarks/quantised.py [--run FOLDER] [--layer 2] [--steps 400] [--d_sae 512]

The rows are those of one run in float32: of --run, or of a random model with the width of the 0.5B model, 4 layers, in
whose embedding three channels are 100 times larger than the rest, on the prompts of tests/reading/streams. They are
written once more in each dtype, quantised ones by the program that a device runs, and examples/train_sae_jax.py's TopK
autoencoder is trained on each in the same order from the same start.

- lost: the error by Euclidean norms; 1 - cosine, mean of the rows; the channel whose largest error is the largest share
  of its root mean square, and that share; as stored, before any autoencoder.
- unexplained: variance of held-out samples that the trained autoencoder misses; of the exact rows, whatever it was
  trained on.
- same features: of those that the autoencoder trained on exact rows chooses for exact rows, the share that it chooses
  for the stored ones, and that the one trained on the stored rows chooses for these.
"""

import argparse
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, output, report, save_model, worker_command

os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator belongs to the worker
sys.path.insert(0, str(ROOT / "examples"))
import jax
import jax.numpy as jnp
import optax
import train_sae_jax as sae

from qwen_jax.kinds import STORED_DTYPES
from qwen_jax.model.quantise import quantise
from qwen_jax.reading import iter_activations, load_shard
from qwen_jax.shards import QuantisedRows, Sample, write_shard
from qwen_jax.shards.statistics import Loss, RowErrors

SHAPE = (896, 1024, 4, 14, 2, 512, True)
EXACT = "float32"
HELD_OUT = 4096
Rows = np.ndarray


def extract(root: Path) -> Path:
    """A run of the random model in float32."""
    model = save_model(root / "model", SHAPE)
    stream = ROOT / "tests" / "reading" / "streams" / "stream_000.jsonl"
    flags = ("--dtype", "float32", "--max_seq_length", "640", "--shard_size_gb", "0.05")
    output(worker_command(stream, model, root, *flags))
    return root / "out" / "worker_0"


def stored_as(rows_RD: Rows, dtype: str) -> Rows | QuantisedRows:
    if not STORED_DTYPES[dtype].is_quantised:
        return rows_RD.astype(dtype)
    found = _quantise(rows_RD[None], dtype)
    return QuantisedRows(*(np.asarray(array)[0] for array in found))


_quantise = jax.jit(quantise, static_argnames="dtype")


def write_as(run: Path, folder: Path, layer: int, dtype: str) -> int:
    """One layer of the run's shards; returns their bytes."""
    folder.mkdir()
    for path in sorted(run.glob("shard_*")):
        samples = [
            Sample(r["sample_idx"], [stored_as(r["activation"], dtype)], r["token_ids"], "preview", "task")
            for r in load_shard(path, layers=[layer])[layer]
        ]
        with open(folder / path.name, "wb") as file:
            write_shard(file, [layer], samples)
    return sum(path.stat().st_size for path in folder.iterdir())


def read(folder: Path, layer: int) -> Rows:
    return np.concatenate(list(iter_activations(folder, layer, 1 << 16)))


def lost(exact_RD: Rows, stored_RD: Rows) -> tuple[Loss, Rows]:
    """And of each channel the largest error as a share of its root mean square."""
    x_RD, found_RD = exact_RD.astype(np.float64), stored_RD.astype(np.float64)
    e_RD = x_RD - found_RD
    of_rows = (np.square(x_RD), x_RD * e_RD, np.square(e_RD))
    errors = RowErrors(*(each.sum(1)[None] for each in of_rows), np.abs(e_RD).max(0)[None, None])
    return Loss.of_samples([errors]), np.abs(e_RD).max(0) / np.sqrt(np.square(x_RD).mean(0))


def batches(folder: Path, args: Namespace) -> Iterator[Rows]:
    reader = sae.read(Namespace(path=folder), args.layer, args.batch_size, held_out=False)
    while True:
        yield sae.next_batch([reader], args.batch_size)[0]


def held_out(folder: Path, layer: int) -> Rows:
    return next(sae.read(Namespace(path=folder), layer, HELD_OUT, held_out=True))


def train(folder: Path, args: Namespace) -> sae.Tree:
    """A trained autoencoder."""
    optimizer, rows = optax.adam(partial(sae.learning_rate, args)), batches(folder, args)
    state = sae.begin(jax.random.key(0), jnp.asarray(next(rows)), args, optimizer)
    step = jax.jit(partial(sae.train_step, args=args, optimizer=optimizer), donate_argnums=0)
    for number in range(args.steps):
        state, _ = step(state, next(rows), number)
    return state


def chosen(state: sae.Tree, rows_RD: Rows, args: Namespace) -> Rows:
    """bool [R, F]: the features that are active."""
    return np.asarray(sae.encode(state["params"], rows_RD * state["scale"], args)[0] > 0)


def share_of(chosen_RF: Rows, again_RF: Rows) -> float:
    return float((chosen_RF & again_RF).sum() / chosen_RF.sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a worker's folder of a run in float32")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--d_sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=512)
    args = parser.parse_args()
    args = Namespace(**vars(args), kind="topk", lr=2e-3)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run = args.run or extract(root)
        sizes = {dtype: write_as(run, root / dtype, args.layer, dtype) for dtype in STORED_DTYPES}
        rows = {dtype: read(root / dtype, args.layer) for dtype in STORED_DTYPES}
        exact, test = train(root / EXACT, args), held_out(root / EXACT, args.layer)
        features = chosen(exact, test, args)
        for dtype in STORED_DTYPES:
            trained = exact if dtype == EXACT else train(root / dtype, args)
            again = held_out(root / dtype, args.layer).astype(np.float32)
            loss, shares_D = lost(rows[EXACT], rows[dtype])
            figures: list[tuple[str, Any]] = [
                ("bytes of the shards, of bfloat16's", f"{sizes[dtype] / sizes['bfloat16']:.2f}"),
                ("lost: relative error", f"{loss.relative_C[0]:.2g}"),
                ("lost: 1 - cosine", f"{loss.cosine_distance_C[0]:.2g}"),
                (
                    "lost: at most, of a channel's root mean square",
                    f"{shares_D.max():.2g} (channel {shares_D.argmax()})",
                ),
                ("unexplained", f"{float(sae.unexplained(trained, test, args)):.5f}"),
                ("same features: rows alone", f"{share_of(features, chosen(exact, again, args)):.4f}"),
                ("same features: trained on them", f"{share_of(features, chosen(trained, again, args)):.4f}"),
            ]
            report(f"{dtype}: {len(rows[dtype]):,} rows of {rows[dtype].shape[1]}", figures)


if __name__ == "__main__":
    main()
