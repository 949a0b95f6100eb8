#!/usr/bin/env python3
"""One stream of prompts -> shards of per-layer hidden states, with a checkpoint after each shard.

Start it again after any interruption: it continues where the last durable shard ends.
Exit codes: 0 done, 2 usage, 65 bad data over the limit, 75 storage unreachable (try again),
76 another writer holds this id, 78 configuration, 130 Ctrl-C, 143 terminated.
"""

import logging
from collections.abc import Sequence

from qwen_jax.cli import log_to_terminal, run_script
from qwen_jax.run.refusal import WorkerParser, accept
from qwen_jax.run.shutdown import run_until_stopped
from qwen_jax.settings import LONGEST, add_settings, take_settings

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = WorkerParser(prog="extract_activations.py", description=__doc__, env_for_all=True)
    add_settings(parser)
    parser.switch("dry_run", "say what the run would write and take, and end", env="")
    parser.switch("verbose", "say more")
    args = vars(parser.parse_args(argv))
    log_to_terminal(LOG_FORMAT, "%H:%M:%S")
    logging.getLogger("qwen_jax").setLevel(logging.DEBUG if args["verbose"] else logging.INFO)
    if args["dry_run"]:
        settings = take_settings(args)
        from qwen_jax.run.plan import Assumptions, make_plan

        print("\n".join(make_plan(settings, Assumptions()).lines_of_text()))
        return 0
    settings = accept(args)
    # What follows imports jax, only after TPU_WORKER_ID has left the environment.
    from qwen_jax.run.worker import extract

    ledger = run_until_stopped(lambda stop: extract(settings, stop))
    where = settings.bucket_url or settings.worker_dir
    print(
        f"worker {settings.worker_id}: {ledger.status}, {ledger.samples_written} samples in "
        f"{len(ledger.shards)} shards, {len(ledger.skipped)} skipped: {where}"
    )
    if settings.max_seq_length != LONGEST and (note := ledger.length_note(settings.max_seq_length)):
        print(note)
    return 0


if __name__ == "__main__":
    run_script(main)
