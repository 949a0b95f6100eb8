#!/usr/bin/env python3
"""A dataset -> N stream files, one for each worker, dealt round-robin. Run it once."""

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from qwen_jax.cli import FlagParser, log_to_terminal, non_negative_int, positive_int, run_script
from qwen_jax.data.arc import DEFAULT_COLUMN, Row
from qwen_jax.data.sources import DEFAULT_DATASET, iter_source_rows
from qwen_jax.data.spread import ALL_TESTS, TESTS, Spread
from qwen_jax.data.streams import stream_name, write_streams

LINE_EVERY_S = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="create_dataset_streams.py", description=__doc__)
    parser.flag("num_streams", "number of streams, one a worker", default=32, type=positive_int)
    parser.flag("output_dir", "folder for the streams", env="DATASET_DIR", default="./data/streams")
    parser.flag("max_samples", "rows to read; without it all of them", type=positive_int)
    parser.flag(
        "dataset_name",
        "Hugging Face id, local file (.jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet, .csv, .txt), or folder",
        default=DEFAULT_DATASET,
    )
    parser.flag(
        "column_name", "column that holds the pairs of grids, a text or a dialogue", default=DEFAULT_COLUMN
    )
    parser.flag("tests", "lines for all tests of a task, or for the first", default=ALL_TESTS, choices=TESTS)
    parser.flag("augment", "views of each task; the first is the task itself", default=1, type=positive_int)
    parser.flag("seed", "of the other views", default=0, type=non_negative_int)
    parser.switch("keep_black", "colour 0 stays itself in all views")
    parser.flag("pieces", "cut texts into pieces of at most so many characters", type=positive_int)
    parser.flag(
        "overlap", "characters that a piece repeats of the one before", default=0, type=non_negative_int
    )
    parser.flag("split", "split of a Hugging Face dataset", default="train")
    parser.flag("revision", "branch, tag or commit of a Hugging Face dataset")
    parser.switch("verbose", "name all rejected rows (at most 1000), not only the first five")
    args = parser.parse_args(argv)
    log_to_terminal("%(levelname)s %(message)s")

    started = time.monotonic()
    rows = islice(iter_source_rows(args.dataset_name, args.split, args.revision), args.max_samples)
    source = {"dataset_name": args.dataset_name, "split": args.split, "revision": args.revision}
    source["max_samples"] = args.max_samples
    spread = Spread(args.tests, args.augment, args.seed, args.keep_black, args.pieces, args.overlap)
    folder = Path(args.output_dir)
    report = write_streams(
        _with_progress(rows, args.max_samples),
        args.num_streams,
        folder,
        column_name=args.column_name,
        source=source | spread.recorded(),
        spread=spread,
    )
    seconds = time.monotonic() - started
    for row in report.listed if args.verbose else report.listed[:5]:
        print(f"row {row.row} rejected: {row.reason}", file=sys.stderr)
    print(
        f"{report.samples} samples in {args.num_streams} streams ({folder / stream_name(0)} ...), "
        f"{report.rejected} rows rejected, {seconds:.1f} s, {report.samples / seconds:.0f} rows/s"
    )
    print(
        "rows were taken for: " + ", ".join(f"{kind} ({count})" for kind, count in report.taken_for.items())
    )
    return 0


def _with_progress(rows: Iterator[Row], total: int | None) -> Iterator[Row]:
    """A bar on a terminal, a plain line every half minute elsewhere."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        yield from tqdm(rows, total=total, unit="row")
        return
    started = last_line = time.monotonic()
    for done, row in enumerate(rows, 1):
        yield row
        if time.monotonic() - last_line >= LINE_EVERY_S:
            last_line = time.monotonic()
            elapsed = tqdm.format_interval(last_line - started)
            print(f"{done}/{total or '?'} rows, {elapsed}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script(main)
