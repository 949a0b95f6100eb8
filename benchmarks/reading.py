"""Rows of one layer out of shards: ours, and the guide's gzip.open + pickle.load; against reading the file once.

    python benchmarks/reading.py [--shards 4] [--rounds 3] [--folder /tmp]

Shards of the 0.5B model's shape (24 layers of 896, bfloat16), random normals, prompts of 500 to 900 tokens. "The
file": its bytes read and thrown away, what the disk or the page cache can do.
"""

import argparse
import gzip
import pickle
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from common import interleave, report

from qwen_jax.reading import iter_activations
from qwen_jax.shards import Sample, write_shard

LAYERS, HIDDEN, SAMPLES = 24, 896, 8


def write_shards(folder: Path, count: int) -> int:
    """Returns the rows of a layer in all of them."""
    rng, rows = np.random.default_rng(0), 0
    for number in range(1, count + 1):
        samples = []
        for index in range(SAMPLES):
            n_tokens = int(rng.integers(500, 900))
            values = rng.normal(size=(LAYERS, n_tokens, HIDDEN)).astype(ml_dtypes.bfloat16)
            tokens = np.arange(n_tokens, dtype=np.int32)
            samples.append(Sample(number * SAMPLES + index, values, tokens, "preview", "task"))
            rows += n_tokens
        with open(folder / f"shard_{number:04d}.pkl.gz", "wb") as file:
            write_shard(file, range(LAYERS), samples)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rows = write_shards(folder, args.shards)

        def ours(layer: int) -> None:
            assert sum(map(len, iter_activations(folder, layer, 4096))) == rows

        def peer() -> None:
            for path in sorted(folder.iterdir()):
                with gzip.open(path, "rb") as file:
                    shard = pickle.load(file)
                np.concatenate([record["activation"] for record in shard[LAYERS - 1]]).astype(np.float32)

        def file() -> None:
            for path in sorted(folder.iterdir()):
                path.read_bytes()

        cases = {"first": lambda: ours(0), "last": lambda: ours(LAYERS - 1), "peer": peer, "file": file}
        seconds = interleave(cases, args.rounds)
        size = sum(path.stat().st_size for path in folder.iterdir())
    speed = {case: rows / seconds[case] for case in cases}
    report(
        f"One layer of {LAYERS} out of {args.shards} shards, {size / 1e9:.2f} GB, {rows:,} rows of width {HIDDEN}",
        [
            ("ours, the first layer", f"{speed['first']:,.0f} rows/s"),
            ("ours, the last layer", f"{speed['last']:,.0f} rows/s"),
            ("gzip.open + pickle.load", f"{speed['peer']:,.0f} rows/s"),
            ("all bytes of the files read", f"{size / seconds['file'] / 1e6:,.0f} MB/s"),
            ("ours, last layer / gzip + pickle", f"{speed['last'] / speed['peer']:.1f}"),
            ("ours, last layer / ours, first layer", f"{speed['last'] / speed['first']:.2f}"),
        ],
    )


if __name__ == "__main__":
    main()
