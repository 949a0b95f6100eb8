"""Says what a run would write and take before it is started: samples, tokens, bytes, shards, memory, time, cost.
Takes the worker's flags and variables. Tokenises the stream, all of it or --plan_samples lines; loads no weights.
--dtype auto and --devices mean this machine's, but with --accelerator that one's.

  python -m qwen_jax plan --worker_id 0 --accelerator v4-8 --plan_samples 500
  python -m qwen_jax plan --worker_id 0 --layers_to_extract 11 --tokens_per_second 30000 --price_per_hour 1.2
"""

from argparse import Namespace

from qwen_jax.cli import FlagParser
from qwen_jax.run.flags import add_worker_flags, to_settings
from qwen_jax.run.plan_flags import add_plan_flags, take_assumptions

ENV_FOR_ALL = True


def add_flags(parser: FlagParser) -> None:
    add_worker_flags(parser)
    add_plan_flags(parser)


def run(args: Namespace) -> int:
    values = vars(args)
    assumptions = take_assumptions(values)
    settings = to_settings(values)
    from qwen_jax.run.plan import make_plan

    print("\n".join(make_plan(settings, assumptions).lines_of_text()))
    return 0
