"""Cost per sample and peak memory of a worker at 1, 10 and 100 times the stream length: both stay flat.

    python benchmarks/scaling.py [--samples 200]

Two layers of the demo model on short real ARC tasks, repeated. The shortest stream already fills eight shards; its
figures are medians of three runs. Seconds per sample: what a stream takes beyond the start, which is timed on a
stream of one sample; a warm compilation cache.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

from common import DEMO_MODEL, arc_rows, report, run, worker_command, write_stream

LENGTHS = (1, 10, 100)


def worker(root: Path, samples: int) -> tuple[float, float]:
    """Wall seconds and peak memory in MB of a worker over so many samples: the shortest tasks, over and over."""
    rows = sorted(arc_rows(), key=lambda row: len(json.dumps(row)))[:60]
    stream = write_stream(root / "stream.jsonl", itertools.islice(itertools.cycle(rows), samples))
    flags = ("--max_seq_length", "512", "--shard_size_gb", "0.004", "--layers_to_extract", "0", "1")
    seconds, _, memory = run(worker_command(stream, DEMO_MODEL, root, *flags))
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        worker(Path(folder), args.samples)  # fills the compilation cache
        start, _ = worker(Path(folder), 1)
        runs = {
            times: [worker(Path(folder), times * args.samples) for _ in range(3 if times == 1 else 1)]
            for times in LENGTHS
        }
    found = {
        times: [statistics.median(column) for column in zip(*runs[times], strict=True)] for times in LENGTHS
    }
    per_sample = {times: (found[times][0] - start) / (times * args.samples) for times in LENGTHS}
    rows = [("start", f"{start:.1f} s")]
    rows += [
        (
            f"{times * args.samples} samples",
            f"{found[times][0]:.1f} s, {1000 * per_sample[times]:.1f} ms a sample, {found[times][1]:.0f} MB peak",
        )
        for times in LENGTHS
    ]
    rows += [
        ("time a sample, 100x / 10x", f"{per_sample[100] / per_sample[10]:.2f}"),
        ("peak memory, 100x / 1x", f"{found[100][1] / found[1][1]:.3f}"),
    ]
    report("A worker over streams of growing length, demo model", rows)


if __name__ == "__main__":
    main()
