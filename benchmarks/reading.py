"""Rows of one layer out of shards: ours, and the guide's gzip.open + pickle.load; for a trainer; and out of a bucket.

    python benchmarks/reading.py [--shards 4] [--rounds 3] [--folder /tmp] [--torch]

Shards of the 0.5B model's shape (24 layers of 896, bfloat16), random normals, prompts of 500 to 900 tokens. "The
file": its bytes read and thrown away, what the disk or the page cache can do. "Inflated": that layer's bytes
decompressed on all cores and thrown away, the limit of any reader: by zlib, which Python has, and by isal. The bucket
is the tests' double in a process of its own, which answers after 20 ms and sends 200 MB/s; "fetched alone": that
layer's bytes, thrown away. --torch adds a DataLoader with a worker a core.
"""

import argparse
import gzip
import os
import pickle
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
from common import bucket, interleave, report
from isal import isal_zlib

from qwen_jax.reading import iter_activations, load_shard
from qwen_jax.reading.activations import READERS, open_shards
from qwen_jax.reading.export import export
from qwen_jax.reading.samples import fetch
from qwen_jax.shards import Sample, write_shard
from qwen_jax.shards.compress import BLOCK_BYTES
from qwen_jax.shards.parts import read_index, wanted_parts

LAYERS, HIDDEN, SAMPLES = 24, 896, 8
LAST, BATCH, BUFFER = LAYERS - 1, 4096, 1 << 14
BY_LOADER = "shuffled by a DataLoader"
LATENCY_S, RATE, URL = 0.02, 200e6, "gs://bucket/run"


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


def gzip_and_pickle(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        with gzip.open(path, "rb") as file:
            shard = pickle.load(file)
        np.concatenate([record["activation"] for record in shard[LAST]]).astype(np.float32)


def inflate(folder: Path, library: ModuleType) -> None:
    """What load_shard must at least do for the last layer, on every core."""

    def one(path: Path) -> None:
        with open(path, "rb") as file:
            for part in wanted_parts(read_index(file), [LAST]):
                file.seek(part.start)
                data, at = memoryview(file.read(part.size)), 0
                while at < len(data):
                    # A member says its size (docs/guide.md).
                    size = int.from_bytes(data[at + 16 : at + 20], "little")
                    library.decompress(data[at : at + size], wbits=31, bufsize=BLOCK_BYTES)
                    at += size

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, sorted(folder.iterdir())))


def torch_epochs(path: Path | str, rows: int) -> Callable[[], None]:
    """An epoch a call, by workers that live as long as the loader."""
    from torch.utils.data import DataLoader

    from qwen_jax.reading.torch import ActivationDataset

    dataset, workers = ActivationDataset(path, LAST, BATCH, BUFFER), len(os.sched_getaffinity(0))
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True)

    def epoch() -> None:
        assert sum(map(len, loader)) == rows

    return epoch


def write_arrow(path: Path, values: np.ndarray) -> None:
    """One column of rows, each as its bytes."""
    import pyarrow as pa

    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * HIDDEN), len(values), [None, pa.py_buffer(values.view(np.uint8))]
    )
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, pa.schema([("row", column.type)])) as out,
    ):
        out.write(pa.record_batch([column], names=["row"]))


def fetch_alone() -> None:
    with ThreadPoolExecutor(2 * READERS) as pool:
        for shard in pool.map(lambda shard: fetch(*shard, [LAST]), open_shards(URL, LAST)):
            shard.turn.close()


def bucket_cases(folder: Path, root: Path, rows: int) -> dict[str, Callable[[], object]]:
    """Uploads the shards, and the last layer as safetensors and Arrow files; a case reads that layer's rows."""
    import pyarrow as pa
    import safetensors.numpy

    from qwen_jax.storage.opening import open_store

    export(folder, "safetensors", root / "safetensors", layers=[LAST])
    store, whole = open_store(URL), root / "whole"
    for path in folder.iterdir():
        store.put_file(path.name, path)
    peers = open_store("gs://bucket/peers")
    files = sorted((root / "safetensors" / f"layer_{LAST:02d}").iterdir())
    for path in files:
        peers.put_file(path.name, path)
        arrow = root / path.with_suffix(".arrow").name
        write_arrow(arrow, safetensors.numpy.load_file(path)["activations"])
        peers.put_file(arrow.name, arrow)

    def ranged() -> None:
        assert sum(map(len, iter_activations(URL, LAST, BATCH))) == rows

    def fetch_whole() -> None:
        for path in sorted(folder.iterdir()):
            store.download_file(path.name, whole)
            for record in load_shard(whole, layers=[LAST])[LAST]:
                record["activation"].astype(np.float32)

    def from_safetensors() -> None:
        for path in files:
            peers.download_file(path.name, whole)
            safetensors.numpy.load_file(whole)["activations"].astype(np.float32)

    def from_arrow() -> None:
        for path in files:
            peers.download_file(path.with_suffix(".arrow").name, whole)
            with pa.memory_map(str(whole)) as source:
                column = pa.ipc.open_file(source).read_all()["row"].chunk(0)
                data = np.frombuffer(column.buffers()[1], ml_dtypes.bfloat16)
                data.reshape(-1, HIDDEN).astype(np.float32)

    return {
        "of shards, that layer alone": ranged,
        "of that layer's bytes, fetched alone": fetch_alone,
        "of shards, fetched whole": fetch_whole,
        "of safetensors files of that layer": from_safetensors,
        "of Arrow files of that layer": from_arrow,
    }


def report_files(shards: int, rows: int, size: int, seconds: dict[str, float]) -> None:
    """size: bytes of the shards; seconds: by case."""
    speed = {case: rows / taken for case, taken in seconds.items()}
    shuffled = [case for case in ("shuffled", BY_LOADER) if case in speed]
    report(
        f"One layer of {LAYERS} out of {shards} shards, {size / 1e9:.2f} GB, {rows:,} rows of width {HIDDEN}",
        [
            ("ours, the first layer", f"{speed['first']:,.0f} rows/s"),
            ("ours, the last layer", f"{speed['last']:,.0f} rows/s"),
            *((f"ours, {case}, buffer of {BUFFER:,}", f"{speed[case]:,.0f} rows/s") for case in shuffled),
            ("gzip.open + pickle.load", f"{speed['peer']:,.0f} rows/s"),
            ("that layer's bytes inflated on all cores by zlib", f"{speed['zlib']:,.0f} rows/s"),
            ("the same by isal", f"{speed['isal']:,.0f} rows/s"),
            ("all bytes of the files read", f"{size / seconds['file'] / 1e6:,.0f} MB/s"),
            ("ours, last layer / gzip + pickle", f"{speed['last'] / speed['peer']:.1f}"),
            *(
                (f"ours, {case} / inflated by {limit}", f"{speed[case] / speed[limit]:.2f}")
                for case, limit in product(shuffled, ("zlib", "isal"))
            ),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    parser.add_argument("--torch", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name) / "shards"
        folder.mkdir()
        rows = write_shards(folder, args.shards)
        size = sum(path.stat().st_size for path in folder.iterdir())

        def ours(layer: int, buffer: int = 0) -> None:
            assert sum(map(len, iter_activations(folder, layer, BATCH, buffer))) == rows

        cases: dict[str, Callable[[], object]] = {
            "first": lambda: ours(0),
            "last": lambda: ours(LAST),
            "shuffled": lambda: ours(LAST, BUFFER),
            "peer": lambda: gzip_and_pickle(folder),
            "zlib": lambda: inflate(folder, zlib),
            "isal": lambda: inflate(folder, isal_zlib),
            "file": lambda: [path.read_bytes() for path in folder.iterdir()],
        }
        if args.torch:
            cases[BY_LOADER] = torch_epochs(folder, rows)
        seconds = interleave(cases, args.rounds)
        with bucket(latency=LATENCY_S, rate=RATE):
            of_bucket = bucket_cases(folder, Path(name), rows)
            if args.torch:
                of_bucket[f"of shards, {BY_LOADER}"] = torch_epochs(URL, rows)
            bucket_seconds = interleave(of_bucket, args.rounds)
    report_files(args.shards, rows, size, seconds)
    report(
        f"The last layer's rows out of a bucket, {LATENCY_S * 1e3:.0f} ms, {RATE / 1e6:.0f} MB/s",
        [(case, f"{rows / bucket_seconds[case]:,.0f} rows/s") for case in of_bucket],
    )


if __name__ == "__main__":
    main()
