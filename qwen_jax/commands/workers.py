"""Progress of every worker: the guide's lines, totals, and where workers leave progress records a table with
failed and stalled ones first. check_all_workers.sh is this command.

Exit code 0 when all workers are complete, 1 while some still run or have not started, 2 when some are failed, stalled
or unreadable.

  ./check_all_workers.sh                              checkpoints in CHECKPOINT_DIR, workers 0 to NUM_WORKERS-1
  ./check_all_workers.sh 64 --watch 30                workers 0 to 63, again every 30 s
  ./check_all_workers.sh --bucket gs://your-bucket/activations --html fleet.html
"""

import json
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from qwen_jax.cli import FlagParser, positive_float
from qwen_jax.errors import UsageError
from qwen_jax.fleet.monitor import (
    STALLED_AFTER_S,
    BucketSource,
    LocalSource,
    Source,
    WorkerState,
    details,
    exit_code,
    look,
    totals_line,
)
from qwen_jax.fleet.page import make_page
from qwen_jax.fleet.workers import number_of_workers

ENV_FOR_ALL = True
_LOOKS_AT_ONCE = 8


def add_flags(parser: FlagParser) -> None:
    parser.add_argument(
        "number", nargs="?", type=number_of_workers, help="number of workers, as --num_workers"
    )
    parser.flag("num_workers", "number of workers", default=32, type=number_of_workers)
    parser.flag("checkpoint_dir", "folder of checkpoint and progress files", default="./checkpoints")
    parser.flag("output_dir", "folder of shards, for sizes and norms", default="./activations")
    parser.flag("bucket", "read the bucket instead: gs://BUCKET/PREFIX, above tpu_0, tpu_1, ...", env="")
    parser.flag(
        "stalled_after",
        "seconds without a sign of life or a sample",
        default=STALLED_AFTER_S,
        type=positive_float,
    )
    parser.flag(
        "watch", "look again every so many seconds, until all are complete", type=positive_float, env=""
    )
    parser.flag("html", "write a page to this file", env="")
    parser.switch("json", "print all that is known as JSON", env="")


def run(args: Namespace) -> int:
    source: Source = LocalSource(Path(args.checkpoint_dir), Path(args.output_dir))
    if args.bucket:
        source = BucketSource(args.bucket if "://" in args.bucket else f"gs://{args.bucket}/activations")
    count = args.number or args.num_workers
    while True:
        now = time.time()
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            looks = [pool.submit(look, source, worker, now, args.stalled_after) for worker in range(count)]
        states = [each.result() for each in looks]
        _print(states, args.json)
        if args.html:
            _write_page(Path(args.html), make_page(states, now, args.watch))
        code = exit_code(states)
        if not args.watch or code == 0:
            return code
        time.sleep(args.watch)


def _print(states: list[WorkerState], as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(state) | {"share": state.share} for state in states]))
        return
    for state in states:
        print(state.guide_line())
    print(totals_line(states))
    for line in details(states):
        print(line)
    sys.stdout.flush()


def _write_page(path: Path, page: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise UsageError(f"--html {path} cannot be written: {error.strerror or error}") from error
