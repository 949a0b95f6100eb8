"""What the plan foretells is what the run then writes."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open

from qwen_jax.cli import FlagParser
from qwen_jax.data.steps import BLOCK_TOKENS
from qwen_jax.errors import BadDataError, ConfigError, UsageError
from qwen_jax.run.plan import USUAL_LENGTHS, Assumptions, make_plan
from qwen_jax.settings import add_settings, take_settings
from tests.run_worker.conftest import arc_lines


def plan_of(workspace, *flags, **assumptions):
    parser = FlagParser(env_for_all=True)
    add_settings(parser)
    args = parser.parse_args([*workspace.command(*flags)[2:]])
    return make_plan(take_settings(vars(args)), Assumptions(**assumptions))


def test_a_full_plan_is_exact(finished):
    plan, totals = plan_of(finished), finished.metadata()["totals"]
    assert plan.exact
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
    assert not some.exact
    assert "from 12 lines drawn at random" in "\n".join(some.lines_of_text())
    assert some.prompt_tokens == pytest.approx(full.prompt_tokens, rel=0.3)
    again = plan_of(finished, plan_samples=12)
    assert list(some.lines_of_text()) == list(again.lines_of_text())


def test_time_and_cost(finished):
    plan = plan_of(finished, tokens_per_second=10.0, price_per_hour=2.0, price_per_gb_month=50.0)
    assert plan.hours == plan.prompt_tokens / 36000
    text = "\n".join(plan.lines_of_text())
    assert f"machine     {plan.hours * 2:,.2f}" in text
    assert f"storage     {plan.compressed_bytes / 1e9 * 50:,.2f} a month" in text
    assert "machine" not in "\n".join(plan_of(finished).lines_of_text())


def test_a_dry_run_writes_nothing(workspace):
    done = workspace.run("--dry_run")
    assert "plan for" in done.stdout and not workspace.output.exists()


def test_another_machine_is_planned_for(finished):
    one = plan_of(finished, "--dtype", "bfloat16")
    eight = plan_of(finished, "--dtype", "bfloat16", "--model_parallel", "2", devices=8)
    assert (one.step.mesh.size, eight.step.mesh.size) == (1, 8)
    assert eight.host_bytes > one.host_bytes  # four rows of devices, so four times the tokens a step
    assert (
        one.step.weight_bytes / 2 < eight.step.weight_bytes < 0.8 * one.step.weight_bytes
    )  # the embedding is not shared
    assert eight.samples == one.samples
    assert "on each of 8" in "\n".join(eight.lines_of_text())


def test_the_memory_of_a_device(finished):
    """Weights up to the deepest layer; the keys and values that are carried on, and the steps in flight."""
    with safe_open(finished.model / "model.safetensors", "numpy") as file:
        sizes = {name: np.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    unused = ("lm_head.weight", "model.norm.weight")
    all_layers = sum(size for name, size in sizes.items() if name not in unused)
    first = sum(size for name, size in sizes.items() if "embed" in name or ".layers.0." in name)
    assert plan_of(finished).step.weight_bytes == 4 * all_layers
    assert plan_of(finished, "--layers_to_extract", "0", "--dtype", "bfloat16").step.weight_bytes == 2 * first
    answers = plan_of(finished, "--layers_to_extract", "0", "--include_answer")
    assert answers.step.weight_bytes == 4 * (all_layers + sizes["model.norm.weight"])
    full = plan_of(finished)
    assert full.step.shape.tokens == 2 * 256  # --batch_size 2 on a CPU
    assert full.step_bytes == 3 * 512 * full.bytes_per_token
    config = full.outline.config
    keys = 2 * 640 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    last_rows = BLOCK_TOKENS * full.bytes_per_token
    assert full.step.carried_bytes == keys + last_rows


def test_the_lengths_and_what_others_would_keep(finished):
    plan = plan_of(finished)
    text = "\n".join(plan.lines_of_text())
    assert len(plan.lengths) == plan.lines and f"longest {plan.lengths.max():,} tokens" in text
    whole = (plan.lengths <= 2048).mean()
    tokens = np.minimum(plan.lengths, 2048).sum()
    assert f"at 2,048    {whole:.1%} of the prompts whole, at most {tokens:,} tokens" in text
    longest = plan.lengths.max()
    assert text.count("of the prompts whole") == 1 + sum(longest > limit for limit in USUAL_LENGTHS[:-1])


def test_a_named_accelerator_is_planned_for(finished):
    """Its devices, its memory, bfloat16 and its form of attention; time follows from a share of the roof."""
    plan = plan_of(finished, accelerator="v4-8", price_per_hour=2.0)
    assert plan.step.mesh.size == 4 and plan.step.dtype == "bfloat16" and plan.step.form.name == "ragged"
    assert plan_of(finished, accelerator="h100").step.form.name == "blocked"
    roof = plan.roof.tokens_per_second(1)
    assert plan.hours == pytest.approx(plan.prompt_tokens / (0.4 * roof) / 3600)
    text = "\n".join(plan.lines_of_text())
    assert "of 34.36 GB of each of the 4 devices of v4-8" in text and " to spare" in text
    assert f"set by the {plan.roof.bound}" in text and "40% of the roof" in text
    given = plan_of(finished, accelerator="v4-8", tokens_per_second=10.0)
    assert given.hours == given.prompt_tokens / 36000


def test_what_leaves_the_device_may_set_the_roof(finished):
    """A small model gives more bytes than the host link takes; of few tokens kept, few leave."""
    every = plan_of(finished, accelerator="v4-8").roof
    assert every.bound == "host link"
    wanted = 4 * 16e9 / plan_of(finished, accelerator="v4-8").bytes_per_token
    assert every.tokens_per_second(1) == pytest.approx(wanted)
    last = plan_of(finished, "--keep_tokens", "last", accelerator="v4-8").roof
    assert last.leaving < every.leaving / 100 and last.bound != "host link"


@pytest.mark.parametrize("batch_size, advice", [("40000", "--batch_size "), ("4", None)])
def test_what_does_not_fit_is_said_with_what_would(finished, batch_size, advice):
    text = "\n".join(plan_of(finished, "--batch_size", batch_size, accelerator="v5litepod-4").lines_of_text())
    assert ("  no room  " in text) == bool(advice)
    if advice:
        assert advice in text and "--max_seq_length" in text


@pytest.mark.parametrize(
    "assumptions, words",
    [
        ({"accelerator": "v9-8"}, "no accelerator 'v9-8' is known here; known are v4-8"),
        ({"accelerator": "v4-8", "devices": 4}, "leave --devices out"),
        ({"compile": True}, "--compile needs --accelerator"),
    ],
)
def test_assumptions_that_contradict_each_other(finished, assumptions, words):
    with pytest.raises(UsageError, match=words):
        plan_of(finished, **assumptions)


@pytest.mark.parametrize(
    "flags, devices, error, words",
    [
        (["--model_parallel", "4"], None, ConfigError, "does not divide the 1 devices planned for"),
        (["--model_parallel", "3"], 8, ConfigError, "does not divide the 8 devices planned for"),
        (["--model_parallel", "8"], 8, ConfigError, "cannot split 4 heads"),
        (["--max_seq_length", "40000"], None, ConfigError, "beyond the 32768 positions"),
        (["--layers_to_extract", "3"], None, UsageError, "this model has layers 0 to 2"),
    ],
)
def test_what_the_run_refuses_the_plan_refuses(finished, flags, devices, error, words):
    with pytest.raises(error, match=words):
        plan_of(finished, *flags, devices=devices)


def test_bad_records_beyond_the_limit_are_refused(workspace, tmp_path):
    stream = tmp_path / "bad.jsonl"
    stream.write_text("\n".join([*arc_lines(2), "{", "[]", "nothing"]) + "\n")
    worker = dataclasses.replace(workspace, stream=stream)
    assert plan_of(worker, "--max_bad_records", "3").skipped == 3
    with pytest.raises(BadDataError, match=r"line 5: .* bad record number 3, more than --max_bad_records 2"):
        plan_of(worker, "--max_bad_records", "2")


def test_samples_are_not_kept(workspace, tmp_path):
    """A stream twenty times as long takes no more memory."""
    line = json.dumps({"text": "some words that go on, " * 60})

    def peak(times: int) -> int:
        stream = tmp_path / f"{times}.jsonl"
        stream.write_text(f"{line}\n" * times)
        worker = dataclasses.replace(workspace, stream=stream)
        tracemalloc.start()
        plan_of(worker)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    plan_of(workspace)  # what is loaded once
    few, many = peak(30), peak(600)
    assert many < few + (2 << 20)  # the stream's digest is taken in pieces of up to 1 MiB
