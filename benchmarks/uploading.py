"""A run that uploads: one shard at a time, and as many at once as a worker does; against the connections' speed.

    python benchmarks/uploading.py [--gigabytes 0.75] [--shards 12] [--rate 50e6] [--rounds 3]

Everything between the device and a completed run (host_path.py) with a bucket, the tests' double in a process of its
own, which takes `--rate` bytes a second over each connection and answers after 20 ms. "Without a bucket" is what
uploading any number of shards at once could reach.
"""

import argparse
import tempfile
from pathlib import Path
from unittest import mock

from common import bucket, interleave, report
from host_path import ours, synthetic_steps

from qwen_jax.run import background
from qwen_jax.run.memory import reuse_freed_memory
from qwen_jax.storage.opening import open_store


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=0.75)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--rate", type=float, default=50e6)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    steps = synthetic_steps(args.gigabytes, "bfloat16")
    reuse_freed_memory()
    with tempfile.TemporaryDirectory() as name, bucket(latency=0.02, upload_rate=args.rate):
        folder = Path(name)

        def uploading(at_once: int) -> None:
            with mock.patch.object(background, "UPLOADS", at_once):
                # A prefix of its own: nothing of an earlier round is there.
                prefix = Path(tempfile.mkdtemp(dir=folder)).name
                ours(steps, folder, args.shards, open_store(f"gs://bucket/{prefix}"))

        cases = {
            "one at a time": lambda: uploading(1),
            f"{background.UPLOADS} at once": lambda: uploading(background.UPLOADS),
            "without a bucket": lambda: ours(steps, folder, args.shards),
        }
        seconds = interleave(cases, args.rounds)
        run = next(path.parent for path in folder.glob("*/metadata.json"))
        size = sum(path.stat().st_size for path in run.glob("shard_*"))
    report(
        f"{size / 1e6:.0f} MB of shards, a bucket that takes {args.rate / 1e6:.0f} MB/s over a connection",
        [(name, f"{size / value / 1e6:.0f} MB/s") for name, value in seconds.items()],
    )


if __name__ == "__main__":
    main()
