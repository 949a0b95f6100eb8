"""Seconds from start to the first new shard: with an empty compilation cache, and with a warm one.

    python benchmarks/restart.py [--rounds 3]

The demo's model and stream, so that starting dominates. Also counts the programs that each start compiled: the
files that it added to the compilation cache.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from common import DEMO_MODEL, ROOT, report, worker_command

STREAM = ROOT / "examples" / "demo" / "streams" / "stream_000.jsonl"


def seconds_to_first_shard(root: Path) -> tuple[float, int]:
    """Starts a fresh worker; returns when its first shard is there, and how many programs it compiled to its end."""
    shutil.rmtree(root / "out", ignore_errors=True)
    command = worker_command(STREAM, DEMO_MODEL, root, "--shard_size_gb", "0.002", "--max_seq_length", "1024")
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
    cold, warm = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
            cold.append(seconds_to_first_shard(Path(folder)))
            warm.append(seconds_to_first_shard(Path(folder)))
    report(
        "From start to the first shard, demo model",
        [
            ("cold compilation cache", f"{statistics.median(seconds for seconds, _ in cold):.1f} s"),
            ("warm compilation cache", f"{statistics.median(seconds for seconds, _ in warm):.1f} s"),
            ("programs compiled by the cold start", f"{max(programs for _, programs in cold)}"),
            ("programs compiled by the warm start", f"{max(programs for _, programs in warm)}"),
        ],
    )


if __name__ == "__main__":
    main()
