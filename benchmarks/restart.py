"""Seconds from start to the first new shard: with an empty compilation cache, and with a warm one.

    python benchmarks/restart.py [--rounds 3]

A small model, so that starting dominates. Also counts the compilations that the warm start had to do.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, report

MODEL = ROOT / "examples" / "demo" / "model"
STREAM = ROOT / "examples" / "demo" / "streams" / "stream_000.jsonl"


def seconds_to_first_shard(root: Path) -> tuple[float, int]:
    """Starts a fresh worker; returns when its first shard is there, and how many programs it compiled."""
    shutil.rmtree(root / "out", ignore_errors=True)
    command = [sys.executable, "extract_activations.py", "--worker_id", "0", "--dataset_path", str(STREAM)]
    command += [
        "--model_path",
        str(MODEL),
        "--output_dir",
        str(root / "out"),
        "--checkpoint_dir",
        str(root / "out"),
    ]
    command += [
        "--compilation_cache_dir",
        str(root / "cache"),
        "--shard_size_gb",
        "0.002",
        "--max_seq_length",
        "1024",
    ]
    before = len(list((root / "cache").glob("*-cache")))
    started = time.perf_counter()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not (root / "out" / "worker_0" / "shard_0001.pkl.gz").exists():
            if process.poll() is not None:
                raise SystemExit("the worker ended without a shard")
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        process.wait()
    return seconds, len(list((root / "cache").glob("*-cache"))) - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cold, warm, compiled = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
            cold.append(seconds_to_first_shard(Path(folder))[0])
            seconds, programs = seconds_to_first_shard(Path(folder))
            warm.append(seconds)
            compiled.append(programs)
    report(
        "From start to the first shard, demo model",
        [
            ("cold compilation cache", f"{statistics.median(cold):.1f} s"),
            ("warm compilation cache", f"{statistics.median(warm):.1f} s"),
            ("programs compiled by the warm start", f"{max(compiled)}"),
        ],
    )


if __name__ == "__main__":
    main()
