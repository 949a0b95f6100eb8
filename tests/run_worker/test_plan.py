"""What the plan foretells is what the run then writes."""

import pytest

from qwen_jax.cli import FlagParser
from qwen_jax.run.flags import add_worker_flags, to_settings
from qwen_jax.run.plan import make_plan
from qwen_jax.run.plan_flags import Assumptions


def plan_of(workspace, *flags, **assumptions):
    parser = FlagParser(env_for_all=True)
    add_worker_flags(parser)
    args = parser.parse_args([*workspace.command(*flags)[2:]])
    return make_plan(to_settings(vars(args)), Assumptions(**assumptions))


def test_a_full_plan_is_exact(finished):
    plan, totals = plan_of(finished), finished.metadata()["totals"]
    assert plan.exact and 0.8 < plan.real_share < 1
    assert (plan.samples, plan.skipped, plan.shortened) == (
        totals["samples"],
        totals["skipped"],
        totals["shortened"],
    )
    assert (plan.prompt_tokens, plan.kept_tokens) == (totals["tokens"], totals["tokens"])
    assert plan.raw_bytes == totals["raw_bytes"]
    assert abs(plan.shards - totals["shards"]) <= 1
    assert plan.compressed_bytes == pytest.approx(totals["bytes"], rel=0.1)


def test_fewer_tokens_and_more_kinds(finished):
    full = plan_of(finished)
    last = plan_of(
        finished, "--keep_tokens", "last", "--activation_type", "residual", "mlp", "--include_embedding"
    )
    assert last.kept_tokens == last.samples == full.samples
    assert last.bytes_per_token == 7 * full.bytes_per_token // 3
    assert last.prompt_tokens == full.prompt_tokens


def test_a_sample_of_the_lines_is_scaled_and_says_so(finished):
    full, some = plan_of(finished), plan_of(finished, plan_samples=12)
    assert not some.exact and some.real_share is None
    assert "from 12 lines drawn at random" in "\n".join(some.lines_of_text())
    assert some.prompt_tokens == pytest.approx(full.prompt_tokens, rel=0.3)
    assert some == plan_of(finished, plan_samples=12)


def test_time_and_cost(finished):
    plan = plan_of(finished, tokens_per_second=10.0, price_per_hour=2.0, price_per_gb_month=50.0)
    assert plan.hours == plan.prompt_tokens / 36000
    text = "\n".join(plan.lines_of_text())
    assert f"machine     {plan.hours * 2:,.2f}" in text
    assert f"storage     {plan.compressed_bytes / 1e9 * 50:,.2f} a month" in text
    assert "machine" not in "\n".join(plan_of(finished).lines_of_text())


def test_a_dry_run_writes_nothing(workspace):
    done = workspace.run("--dry_run", "--plan_samples", "5")
    assert "plan for" in done.stdout and not workspace.output.exists()
