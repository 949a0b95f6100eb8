"""Says what a run would write and take before it is started: samples, tokens, bytes, shards, memory, time, cost.
Takes the worker's flags and variables. Tokenises the stream, all of it or --plan_samples lines; loads no weights.
--dtype auto and --devices mean this machine's, but with --accelerator that one's.

  python -m qwen_jax plan --worker_id 0 --accelerator v4-8 --plan_samples 500
  python -m qwen_jax plan --worker_id 0 --layers_to_extract 11 --tokens_per_second 30000 --price_per_hour 1.2
"""

from argparse import Namespace

from qwen_jax.cli import FlagParser, positive_float, positive_int
from qwen_jax.settings import add_settings, take_settings

ENV_FOR_ALL = True


def add_flags(parser: FlagParser) -> None:
    add_settings(parser)
    _add_assumptions(parser)


def run(args: Namespace) -> int:
    values = vars(args)
    settings = take_settings(values)
    from qwen_jax.run.plan import Assumptions, make_plan

    print("\n".join(make_plan(settings, Assumptions(**values)).lines_of_text()))
    return 0


def _add_assumptions(parser: FlagParser) -> None:
    """Without variables: they describe a question, not a worker."""
    flag = parser.flag
    flag("plan_samples", "tokenise so many lines, drawn at random", type=positive_int, env="")
    flag(
        "accelerator",
        "the machine planned for, as v4-8, v5litepod-4, v6e-8, tpu7x-8, h100; without it this one",
        env="",
    )
    flag(
        "devices",
        "accelerator chips of the machine planned for; without it this machine's",
        type=positive_int,
        env="",
    )
    flag("tokens_per_second", "prompt tokens that the machine computes", type=positive_float, env="")
    flag(
        "roof_share",
        "share of what the accelerator could do at most, for tokens/s where none are given",
        default=0.4,
        type=positive_float,
        env="",
    )
    parser.switch("compile", "ask the accelerator's compiler too; needs jax[tpu], no TPU", env="")
    flag("price_per_hour", "of the machine", type=positive_float, env="")
    flag("price_per_gb_month", "of storage, for 10**9 bytes", type=positive_float, env="")
