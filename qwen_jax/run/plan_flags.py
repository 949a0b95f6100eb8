"""What a plan is told beside the worker's flags."""

from dataclasses import dataclass, fields
from typing import Any

from qwen_jax.cli import FlagParser, positive_float, positive_int


@dataclass(frozen=True)
class Assumptions:
    """plan_samples: lines to tokenise, None for all. accelerator: the machine planned for, by a name of model/chips.py,
    None for this machine or one with so many `devices`. compile: asks that machine's compiler. roof_share: of what its
    devices could do, where tokens_per_second is not given. Prices in any currency; a GB is 10**9 bytes."""

    plan_samples: int | None = None
    accelerator: str | None = None
    devices: int | None = None
    compile: bool = False
    roof_share: float = 0.4
    tokens_per_second: float | None = None
    price_per_hour: float | None = None
    price_per_gb_month: float | None = None


def add_plan_flags(parser: FlagParser) -> None:
    """Flags that have no variable: they describe a question, not a worker."""
    parser.flag("plan_samples", "plan: tokenise so many lines, drawn at random", type=positive_int, env="")
    parser.flag(
        "accelerator",
        "plan: the machine planned for, as v4-8, v5litepod-4, v6e-8, tpu7x-8, h100; without it this one",
        env="",
    )
    parser.flag(
        "devices",
        "plan: accelerator chips of the machine planned for; without it this machine's",
        type=positive_int,
        env="",
    )
    parser.flag(
        "tokens_per_second", "plan: prompt tokens that the machine computes", type=positive_float, env=""
    )
    parser.flag(
        "roof_share",
        "plan: share of what the accelerator could do at most, for tokens/s where none are given",
        default=0.4,
        type=positive_float,
        env="",
    )
    parser.switch("compile", "plan: ask the accelerator's compiler too; needs jax[tpu], no TPU", env="")
    parser.flag("price_per_hour", "plan: of the machine", type=positive_float, env="")
    parser.flag("price_per_gb_month", "plan: of storage, for 10**9 bytes", type=positive_float, env="")


def take_assumptions(args: dict[str, Any]) -> Assumptions:
    """Takes the plan's flags out of parsed arguments."""
    return Assumptions(**{field.name: args.pop(field.name) for field in fields(Assumptions)})
