#!/usr/bin/env python3
"""One stream of prompts -> shards of per-layer hidden states, with a checkpoint after each shard.

Start it again after any interruption: it continues where the last durable shard ends.
Exit codes: 0 done, 2 usage, 65 bad data over the limit, 75 storage unreachable (try again),
76 another writer holds this id, 78 configuration, 143 terminated.
"""

import logging
from collections.abc import Sequence

from qwen_jax.cli import FlagParser, log_to_terminal, run_script
from qwen_jax.run.flags import add_worker_flags, to_settings
from qwen_jax.run.plan_flags import add_plan_flags, take_assumptions
from qwen_jax.run.shutdown import run_until_sigterm

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = FlagParser(prog="extract_activations.py", description=__doc__, env_for_all=True)
    add_worker_flags(parser)
    parser.switch("dry_run", "say what the run would write and take, and end", env="")
    add_plan_flags(parser)
    parser.switch("verbose", "say more")
    args = vars(parser.parse_args(argv))
    dry_run, verbose, assumptions = args.pop("dry_run"), args.pop("verbose"), take_assumptions(args)
    settings = to_settings(args)
    log_to_terminal(LOG_FORMAT, "%H:%M:%S")
    logging.getLogger("qwen_jax").setLevel(logging.DEBUG if verbose else logging.INFO)
    # What follows imports jax, only after TPU_WORKER_ID has left the environment.
    if dry_run:
        from qwen_jax.run.plan import make_plan

        print("\n".join(make_plan(settings, assumptions).lines_of_text()))
        return 0
    from qwen_jax.run.worker import extract

    ledger = run_until_sigterm(lambda stop: extract(settings, stop))
    where = settings.bucket_url or settings.output_dir
    print(
        f"worker {settings.worker_id}: {ledger.status}, {ledger.samples_written} samples in "
        f"{len(ledger.shards)} shards, {len(ledger.skipped)} skipped: {where}"
    )
    if note := ledger.length_note(settings.max_seq_length):
        print(note)
    return 0


if __name__ == "__main__":
    run_script(main)
