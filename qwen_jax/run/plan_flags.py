"""What a plan is told beside the worker's flags."""

from dataclasses import dataclass, fields
from typing import Any

from qwen_jax.cli import FlagParser, positive_float, positive_int


@dataclass(frozen=True)
class Assumptions:
    """plan_samples: lines to tokenise, None for all. devices: of the machine planned for, None for this machine's.
    Prices in any currency; a GB is 10**9 bytes."""

    plan_samples: int | None = None
    devices: int | None = None
    tokens_per_second: float | None = None
    price_per_hour: float | None = None
    price_per_gb_month: float | None = None


def add_plan_flags(parser: FlagParser) -> None:
    """Flags that have no variable: they describe a question, not a worker."""
    parser.flag("plan_samples", "plan: tokenise so many lines, drawn at random", type=positive_int, env="")
    parser.flag(
        "devices",
        "plan: accelerator chips of the machine planned for; without it this machine's",
        type=positive_int,
        env="",
    )
    parser.flag(
        "tokens_per_second", "plan: prompt tokens that the machine computes", type=positive_float, env=""
    )
    parser.flag("price_per_hour", "plan: of the machine", type=positive_float, env="")
    parser.flag("price_per_gb_month", "plan: of storage, for 10**9 bytes", type=positive_float, env="")


def take_assumptions(args: dict[str, Any]) -> Assumptions:
    """Takes the plan's flags out of parsed arguments."""
    return Assumptions(**{field.name: args.pop(field.name) for field in fields(Assumptions)})
