"""Whether a worker would run on this machine: one line a check, `pass`, `note` or `fail` with what to do. Takes the
worker's flags and variables. What needs neither jax nor the network a worker looks at itself when it starts.

Exit code 0 when nothing fails, else that of the first failure, as a worker would end.

  python -m qwen_jax doctor --worker_id 0
  GCS_BUCKET=your-bucket UPLOAD_TO_GCS=true python -m qwen_jax doctor --worker_id 0
"""

from argparse import Namespace

from qwen_jax.cli import FlagParser, say
from qwen_jax.settings import add_settings, take_settings

ENV_FOR_ALL = True


def add_flags(parser: FlagParser) -> None:
    add_settings(parser)


def run(args: Namespace) -> int:
    settings = take_settings(vars(args))
    from qwen_jax.run.doctor import examine

    code = 0
    for finding in examine(settings):
        say(finding)
        if finding.error:
            code = code or finding.error.exit_code
    return code
