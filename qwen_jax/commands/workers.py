"""Progress of every worker: the guide's lines, totals, and where workers leave progress records a table with
failed, stalled and slow ones first. check_all_workers.sh is this command.

Exit code 0 when all workers are complete, 1 while some still run or have not started, 2 when some are failed, stalled
or unreadable.

  ./check_all_workers.sh                              checkpoints in CHECKPOINT_DIR, workers 0 to NUM_WORKERS-1
  ./check_all_workers.sh 64 --watch 30                workers 0 to 63, again every 30 s
  ./check_all_workers.sh --bucket gs://your-bucket --html fleet.html
"""

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from qwen_jax.cli import FlagParser, positive_float
from qwen_jax.errors import StorageError, UsageError
from qwen_jax.fleet.monitor import (
    STALLED_AFTER_S,
    WorkerState,
    bucket_files,
    details,
    exit_code,
    look,
    mark_slow,
    totals_line,
)
from qwen_jax.fleet.worker_variables import number_of_workers
from qwen_jax.ledger.schema import NOT_STARTED
from qwen_jax.ledger.worker_files import WorkerFiles

ENV_FOR_ALL = True
_LOOKS_AT_ONCE = 8

FilesOf = Callable[[int], WorkerFiles]
"""The files of a worker, by id."""


def add_flags(parser: FlagParser) -> None:
    parser.add_argument(
        "number", nargs="?", type=number_of_workers, help="number of workers, as --num_workers"
    )
    parser.flag("num_workers", "number of workers", default=32, type=number_of_workers)
    parser.flag("checkpoint_dir", "folder of checkpoint and progress files", default="./checkpoints")
    parser.flag("output_dir", "folder of shards, for sizes and norms", default="./activations")
    parser.flag("bucket", "read the bucket instead: gs://BUCKET, or gs://BUCKET/PREFIX above tpu_0", env="")
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
    files_of, where = _files(args)
    count = args.number or args.num_workers
    while True:
        code = None
        try:
            code = _look_once(args, files_of, where, count)
        except StorageError as error:
            if not args.watch:
                raise
            print(f"not seen this time: {error}", file=sys.stderr, flush=True)
        if code == 0 or (code is not None and not args.watch):
            return code
        time.sleep(args.watch)


def _files(args: Namespace) -> tuple[FilesOf, str]:
    """Where to look, and its name."""
    if not args.bucket:
        folders = Path(args.checkpoint_dir), Path(args.output_dir)
        return partial(WorkerFiles.local, *folders), args.checkpoint_dir
    url = shards_url(args.bucket, os.environ.get("GCS_PREFIX") or "activations")
    return partial(WorkerFiles.stored, bucket_files(url)), url


def shards_url(bucket: str, prefix: str) -> str:
    """What lies above tpu_0, tpu_1, ...: a bucket's name alone, with gs:// or without, means its `prefix`."""
    url = (bucket if "://" in bucket else f"gs://{bucket}").rstrip("/")
    is_name = url.startswith("gs://") and "/" not in url.removeprefix("gs://")
    return f"{url}/{prefix.strip('/')}" if is_name else url


def _look_once(args: Namespace, files_of: FilesOf, where: str, count: int) -> int:
    now = time.time()
    states = mark_slow(_look_at_all(files_of, count, now, args.stalled_after))
    _print(states, args.json)
    if args.html:
        from qwen_jax.fleet.page import make_page  # jinja2 is not on every machine that looks

        _write_page(Path(args.html), make_page(states, now, args.watch, where))
    if all(state.state == NOT_STARTED for state in states):
        advice = "other places: --bucket gs://BUCKET/PREFIX, or --checkpoint_dir"
        print(f"nothing of any worker was found in {where}; {advice}", file=sys.stderr, flush=True)
    return exit_code(states)


def _look_at_all(files_of: FilesOf, count: int, now: float, stalled_after_s: float) -> list[WorkerState]:
    """Raises the first error; who has not been looked at by then, is not."""
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        looks = [pool.submit(look, files_of(worker), now, stalled_after_s) for worker in range(count)]
        try:
            return [each.result() for each in looks]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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
