"""How well iter_activations mixes: how often two neighbours in a batch come from one sample, against chance.

    python benchmarks/shuffle.py [--rounds 3]

Shards as a run with the defaults leaves them (24 layers of 896, bfloat16, 1 GiB before compression: about 25,000 rows
of a layer), with rows one value wide, so that only the order is measured. Chance: drawn from all rows at random. Short
prompts have 500 to 900 tokens, long ones 2,000 to 16,000.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
from common import report

from qwen_jax.reading import iter_activations
from qwen_jax.shards import Sample, write_shard

SHARDS, ROWS_A_SHARD = 48, (1 << 30) // (24 * 896 * 2)
LENGTHS = {"short": (500, 900), "long": (2_000, 16_000)}
CASES = [(0, 1), (1 << 14, 1), (1 << 16, 1), (1 << 18, 1), (1 << 16, 4), (1 << 16, 16)]
"""shuffle_buffer, shards_at_once."""


def write_shards(folder: Path, lengths: tuple[int, int]) -> np.ndarray:
    """Returns the rows of each sample."""
    rng, counts = np.random.default_rng(0), []
    for number in range(1, SHARDS + 1):
        samples, rows = [], 0
        while rows < ROWS_A_SHARD:
            n_tokens = int(rng.integers(*lengths))
            tokens = np.zeros(n_tokens, np.int32)
            values = np.zeros((1, n_tokens, 1), np.float16)
            samples.append(Sample(len(counts), values, tokens, "preview", "task"))
            counts.append(n_tokens)
            rows += n_tokens
        file = io.BytesIO()
        write_shard(file, [0], samples)
        (folder / f"shard_{number:04d}.pkl.gz").write_bytes(file.getvalue())
    return np.array(counts)


def same_sample(folder: Path, buffer: int, at_once: int, seed: int) -> float:
    """The share of neighbours that are of one sample."""
    batches = iter_activations(folder, 0, 4096, buffer, seed, shards_at_once=at_once, with_tokens=True)
    same = [(rows.sample_idx[1:] == rows.sample_idx[:-1]).mean() for rows in batches]
    return float(np.mean(same))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for name, lengths in LENGTHS.items():
        with tempfile.TemporaryDirectory() as root:
            counts = write_shards(Path(root), lengths)
            chance = float(np.square(counts / counts.sum()).sum())
            rows = []
            for buffer, at_once in CASES:
                drawn = [same_sample(Path(root), buffer, at_once, seed) for seed in range(args.rounds)]
                share = float(np.mean(drawn))
                rows.append(
                    (
                        f"shuffle_buffer {buffer:,}, shards_at_once {at_once}",
                        f"{share:.5f}, {share / chance:.1f}",
                    )
                )
        report(
            f"{name} prompts: {len(counts):,} samples, {counts.sum():,} rows in {SHARDS} shards; chance {chance:.5f}\n"
            "neighbours of one sample, and how many times chance that is",
            rows,
        )


if __name__ == "__main__":
    main()
