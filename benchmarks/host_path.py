"""The host's work per byte: parts of samples, shards, compress, write; against bare isal, the disk, and gzip + pickle.

    python benchmarks/host_path.py [--gigabytes 1] [--dtype bfloat16] [--rounds 5] [--folder /tmp]

"Ours" is everything between the device and a completed local run: synced shards, metadata, checkpoint.

Activations are random normals rounded to bfloat16 (int8 and float8_e4m3fn: codes of those, with what belongs to them),
of the 0.5B model's shape (24 layers of 896), in the steps that an accelerator's defaults give; samples of 500 to 2,048
tokens.
"""

import argparse
import gzip
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from common import interleave, plain_sample, report
from isal import isal_zlib

from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.data.steps import Step, StepShape, lay_into_steps, step_tokens
from qwen_jax.kinds import EXACT_CHANNELS, STORED_DTYPES
from qwen_jax.ledger.metadata import Ledger, RunIdentity
from qwen_jax.model.capture import RowResult, TapRows
from qwen_jax.run.background import BackgroundCommitter
from qwen_jax.run.commit import Committer, Fence
from qwen_jax.run.memory import reuse_freed_memory
from qwen_jax.run.pipeline import CapturedSample, FilledShard, captured_samples
from qwen_jax.run.places import Places
from qwen_jax.shards.compress import BLOCK_BYTES
from qwen_jax.storage.store import Store

LAYERS, HIDDEN = 24, 896
SHAPE = StepShape(tokens=step_tokens(4, 2048, on_cpu=False), positions=2048)
SHARDS = 4
PEER_SHARE = 40  # the peer is so slow that it gets only this part of the data


def samples_of(tokens: int) -> list[TokenizedSample]:
    """So many tokens in all."""
    rng, samples = np.random.default_rng(0), []
    while tokens:
        count = min(tokens, int(rng.integers(500, 2049)))
        samples.append(plain_sample(len(samples), np.arange(count, dtype=np.int32)))
        tokens -= count
    return samples


@dataclass(frozen=True)
class Computed:
    """A step that is done, as the device hands it over (run.pipeline.Pending)."""

    row: RowResult

    def rows(self) -> list[RowResult]:
        return [self.row]


def synthetic_steps(gigabytes: float, dtype: str) -> list[tuple[Step, Computed]]:
    """Full steps."""
    rng = np.random.default_rng(0)
    bytes_per_step = LAYERS * SHAPE.tokens * HIDDEN * np.dtype(dtype).itemsize
    count = max(1, round(gigabytes * 2**30 / bytes_per_step))
    steps = []
    for step in lay_into_steps(samples_of(count * SHAPE.tokens), SHAPE):
        values = rng.normal(size=(LAYERS, SHAPE.tokens, HIDDEN)).astype(np.float32).astype(ml_dtypes.bfloat16)
        stored, more = stored_as(values, dtype), 3 if STORED_DTYPES[dtype].is_quantised else 0
        of_rows = np.ones((1 + more, LAYERS, SHAPE.tokens), np.float32)
        of_blocks = np.zeros((3 + bool(more), LAYERS, SHAPE.blocks, HIDDEN), np.float32)
        rows = TapRows(stored, tuple(of_rows), tuple(of_blocks))
        steps.append((step, Computed(RowResult({"residual": rows}))))
    return steps


def stored_as(values_CRD: np.ndarray, dtype: str) -> tuple[np.ndarray, ...]:
    """What leaves the device of these values; the channels that are exact are the first ones, which costs the same."""
    largest = STORED_DTYPES[dtype].largest
    if not largest:
        return (values_CRD.astype(dtype),)
    scale_CR = np.abs(values_CRD).max(axis=2).astype(np.float32) / largest
    codes_CRD = (
        np.rint(values_CRD / scale_CR[..., None]) if dtype == "int8" else values_CRD / scale_CR[..., None]
    )
    channels_K = np.arange(EXACT_CHANNELS, dtype=np.int32)
    channels_CRK = np.tile(channels_K, (*scale_CR.shape, 1))
    return codes_CRD.astype(dtype), scale_CR, channels_CRK, values_CRD[..., :EXACT_CHANNELS].copy()


def off_the_device(steps: Sequence[tuple[Step, Computed]]) -> list[CapturedSample]:
    computed = iter([computed for _, computed in steps])
    return list(captured_samples([step for step, _ in steps], lambda step: next(computed)))


def activations(sample: CapturedSample) -> np.ndarray:
    return np.concatenate(sample.taps["residual"].pieces, axis=1)


def raw_bytes(sample: CapturedSample) -> np.ndarray:
    """All that is stored of its rows."""
    tap = sample.taps["residual"]
    return np.concatenate([array.reshape(-1).view(np.uint8) for array in (*tap.pieces, *tap.beside)])


def ours(
    steps: Sequence[tuple[Step, Computed]], parent: Path, shards: int = SHARDS, store: Store | None = None
) -> None:
    """What a worker does with the steps, in a folder of its own: to delete what an earlier run left takes time."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    places = Places(folder, folder / "checkpoint.json", "checkpoint.json", store)
    committer = Committer(RunIdentity(0, "", "", {}, {}), places, range(LAYERS), Ledger(), Fence())
    samples = off_the_device(steps)
    with BackgroundCommitter(committer) as background:
        for number in range(shards):
            shard = FilledShard()
            for sample in samples[number * len(samples) // shards : (number + 1) * len(samples) // shards]:
                shard.add(sample)
            background.add(shard)
        background.wait()
    committer.complete(len(samples), [])


def bare_isal(data: memoryview) -> None:
    """All blocks through isal level 1 on all cores, nothing else."""
    blocks = [data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(lambda block: isal_zlib.compress(block, 1, 31), blocks):
            pass


class Apart:
    """Calls a function in a forked process, which keeps the allocator's settings of the time of the fork."""

    def __init__(self, function: Callable[[], None]):
        self._ours, self._theirs = multiprocessing.Pipe()
        self._function = function
        multiprocessing.get_context("fork").Process(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._theirs.recv()
            self._function()
            self._theirs.send(None)

    def __call__(self) -> None:
        self._ours.send(None)
        self._ours.recv()


def report_speeds(dtype: str, size: int, speed: dict[str, float], compressed: float) -> None:
    """speed: raw MB/s by case; compressed: what is left of a byte."""
    limit = min(speed["isal_reusing"], speed["disk"] / compressed)
    report(
        f"Host path, {size / 1e9:.2f} GB of {dtype} hidden states, raw MB/s",
        [
            ("ours: parts, statistics, shard, compress, write, sync", f"{speed['ours']:.0f} MB/s"),
            ("bare isal level 1 on all cores", f"{speed['isal']:.0f} MB/s"),
            ("bare isal, with the worker's allocator settings", f"{speed['isal_reusing']:.0f} MB/s"),
            ("disk: write and sync as it is", f"{speed['disk']:.0f} MB/s"),
            ("gzip.open + pickle.dump", f"{speed['peer']:.1f} MB/s"),
            ("ours / bare isal", f"{speed['ours'] / speed['isal']:.2f}"),
            ("ours / the slower of isal (same allocator) and disk", f"{speed['ours'] / limit:.2f}"),
            ("ours / gzip + pickle", f"{speed['ours'] / speed['peer']:.0f}"),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--dtype", choices=STORED_DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the temporary folder)")
    args = parser.parse_args()
    steps = synthetic_steps(args.gigabytes, args.dtype)
    samples = off_the_device(steps)
    raw = np.concatenate([raw_bytes(sample) for sample in samples])
    part = samples[: max(1, len(samples) // PEER_SHARE)]
    part_bytes = sum(sample.nbytes for sample in part)
    apart = Apart(lambda: bare_isal(memoryview(raw)))
    reuse_freed_memory()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        target = Path(folder) / "peer"

        def disk() -> None:
            with open(target, "wb") as file:
                file.write(memoryview(raw))
                os.fsync(file.fileno())

        def peer() -> None:
            whole = [activations(sample) for sample in part]
            records = {layer: [array[layer] for array in whole] for layer in range(LAYERS)}
            with gzip.open(target, "wb") as file:
                pickle.dump(records, file)

        cases = {
            "ours": lambda: ours(steps, Path(folder)),
            "isal": apart,
            "isal_reusing": lambda: bare_isal(memoryview(raw)),
            "disk": disk,
            "peer": peer,
        }
        seconds = interleave(cases, args.rounds)
        run = next(Path(folder).glob("*/"))
        compressed = sum(path.stat().st_size for path in run.glob("shard_*.pkl.gz")) / raw.nbytes
    speed = {name: raw.nbytes / seconds[name] / 1e6 for name in cases}
    speed["peer"] = part_bytes / seconds["peer"] / 1e6
    report_speeds(args.dtype, raw.nbytes, speed, compressed)


if __name__ == "__main__":
    main()
