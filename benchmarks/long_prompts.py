"""A worker on long prompts: tokens/s and real positions at --max_seq_length 32,768, and peak memory against 2,048.

    python benchmarks/long_prompts.py [--samples 100] [--layers 4] [--size 7B] [--rounds 1] [--base FOLDER]
        [--positions_only]

A small random model (width 256, or of a published --size) on tasks whose prompts are long (common.long_rows), end to
end, the start included, a warm compilation cache. At both lengths a step takes as many tokens. The growth of memory
that run/memory.py allows is that of its bound and of the carried keys and values, which a CPU holds in the same memory;
a layer's keys once more and the tables of sines and cosines come besides. Real positions are also counted for 200 ARC
tasks at 2,048, and for the steps of accelerators. --base is a worktree of an older commit, which gets the same flags.
"""

import argparse
import tempfile
from pathlib import Path

from common import (
    ROOT,
    WORKER_DTYPE,
    WORKER_PLATFORMS,
    arc_rows,
    interleave_commands,
    long_rows,
    make_program,
    published,
    real_positions,
    report,
    save_model,
    tokenized_rows,
    worker_command,
    write_stream,
)

from qwen_jax.data.steps import StepShape, step_tokens
from qwen_jax.model.attention import make_form
from qwen_jax.run.memory import activation_bytes_bound

WIDTH, VOCABULARY = 256, 151_936
LONG, SHORT = 32_768, 2048
SHARD_GB = 0.125


def shapes(length: int) -> dict[str, StepShape]:
    """The defaults' steps: of a CPU, a GPU, and TPUs, on which samples start on a page."""
    tokens = step_tokens(4, length, on_cpu=False)
    page = make_form("ragged", "tpu", tokens, length).page
    return {
        "CPU": StepShape.of(step_tokens(4, length, on_cpu=True), length),
        "GPU": StepShape.of(tokens, length),
        "TPU": StepShape.of(tokens, length, 1, page),
        "4 TPUs": StepShape.of(tokens, length, 4, page),
    }


def position_rows(samples: int) -> list[tuple[str, str]]:
    found = []
    for name, rows, length in (("ARC tasks", arc_rows(200), SHORT), ("long tasks", long_rows(samples), LONG)):
        prompts = tokenized_rows(rows, length)
        shares = ", ".join(
            f"{device} {real_positions(prompts, shape):.3f}" for device, shape in shapes(length).items()
        )
        found.append((f"real positions, {len(prompts)} {name} at {length:,}", shares))
    return found


def model_shape(args: argparse.Namespace) -> tuple:
    """As save_model takes it."""
    if args.size:
        return published(args.size, args.layers)
    return (WIDTH, 4 * WIDTH, args.layers or 4, 4, 2, VOCABULARY, True)


def run_rows(args: argparse.Namespace) -> list[tuple[str, str]]:
    rows = long_rows(args.samples)
    tokens = {length: sum(len(s.token_ids) for s in tokenized_rows(rows, length)) for length in (LONG, SHORT)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stream = write_stream(root / "stream.jsonl", rows)
        model = save_model(root / "model", model_shape(args))
        programs = {length: make_program(model, length) for length in (LONG, SHORT)}

        def worker(name: str, length: int, checkout: Path = ROOT) -> list[str]:
            flags = ("--max_seq_length", str(length), "--shard_size_gb", str(SHARD_GB))
            return worker_command(stream, model, root / name, *flags, checkout=checkout)

        cases = {"ours": worker("ours", LONG), "short": worker("short", SHORT)}
        if args.base:
            cases["base"] = worker("base", LONG, args.base.resolve())
        figures = interleave_commands(cases, args.rounds, root, cases)

    def line(name: str, length: int) -> str:
        wall, cpu, memory = figures[name]
        speed = tokens[length] / wall
        return f"{speed:,.0f} tokens/s, {wall:.1f} s wall, {cpu:.1f} s CPU, {memory:.0f} MB peak"

    def allowed(length: int) -> float:
        """MB by the formula."""
        program = programs[length]
        bytes_per_token = program.num_layers * program.config.hidden_size * 4
        bound = activation_bytes_bound(program.shape, bytes_per_token, int(SHARD_GB * 2**30))
        return (bound + program.carried_bytes) / 2**20

    carried = programs[LONG].carried_bytes / 2**20
    (wall, _, peak), (_, _, short_peak) = figures["ours"], figures["short"]
    found = [(f"ours at {LONG:,}", line("ours", LONG)), (f"ours at {SHORT:,}", line("short", SHORT))]
    if args.base:
        base_wall, _, base_peak = figures["base"]
        found += [
            (f"base at {LONG:,}", line("base", LONG)),
            (f"base / ours at {LONG:,}", f"{base_wall / wall:.2f} wall, {base_peak / peak:.2f} memory"),
        ]
    if WORKER_PLATFORMS != "cpu":
        return found  # where the carried keys lie in the device's memory
    return [
        *found,
        (f"carried keys and values at {LONG:,}", f"{carried:.0f} MB"),
        (f"peak at {LONG:,} without them / peak at {SHORT:,}", f"{(peak - carried) / short_peak:.2f}"),
        (
            f"growth of the peak from {SHORT:,} to {LONG:,}",
            f"{peak - short_peak:.0f} MB, by the formula at most {allowed(LONG) - allowed(SHORT):.0f} MB",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--layers", type=int, help="4, or those of --size")
    parser.add_argument("--size", help="of a published model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--base", type=Path, help="a worktree of an older commit, to compare with")
    parser.add_argument("--positions_only", action="store_true", help="run no worker")
    args = parser.parse_args()
    rows = [] if args.positions_only else run_rows(args)
    report(
        f"{args.samples} long prompts, {model_shape(args)[2]} layers of width {model_shape(args)[0]}, {WORKER_DTYPE}",
        rows + position_rows(args.samples),
    )


if __name__ == "__main__":
    main()
