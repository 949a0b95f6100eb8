"""Whether a worker would run on this machine: one line a check, `pass`, `note` or `fail` with what to do. Takes the
worker's flags and variables. launch_worker.sh runs `doctor --quick` first, which leaves a progress record of a failure.

Exit code 0 when nothing fails, else that of the first failure, as a worker would end.

  python -m qwen_jax doctor --worker_id 0
  GCS_BUCKET=your-bucket UPLOAD_TO_GCS=true python -m qwen_jax doctor --worker_id 0
"""

import os
from argparse import Namespace

from qwen_jax.cli import FlagParser
from qwen_jax.run.flags import add_worker_flags, to_settings
from qwen_jax.run.plan_flags import add_plan_flags, take_assumptions

ENV_FOR_ALL = True
_RETRY_S = "20"


def add_flags(parser: FlagParser) -> None:
    parser.switch("quick", "only what needs neither jax nor the network, and say only what is wrong", env="")
    add_worker_flags(parser)
    parser.switch("dry_run", "the worker's; changes nothing here", env="")
    parser.switch("verbose", "the worker's; changes nothing here", env="")
    add_plan_flags(parser)


def run(args: Namespace) -> int:
    values = vars(args)
    quick, is_dry = values.pop("quick"), values.pop("dry_run")
    values.pop("verbose")
    take_assumptions(values)
    settings = to_settings(values)
    os.environ.setdefault("GCS_RETRY_BUDGET_S", _RETRY_S)  # a worker waits longer
    from qwen_jax.run.doctor import FAIL, Finding, examine
    from qwen_jax.run.progress_record import leave_failure

    failed: Finding | None = None
    for finding in examine(settings, quick=quick):
        if not quick or finding.outcome == FAIL:
            print(finding, flush=True)
        if finding.outcome == FAIL:
            failed = failed or finding
    if failed is None:
        return 0
    if quick and not is_dry:
        leave_failure(settings, failed.text, failed.exit_code)
    return failed.exit_code
