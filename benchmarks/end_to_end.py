"""Real ARC prompts to durable shards: ours, an older commit, a straightforward Hugging Face script, TransformerLens.

    python benchmarks/end_to_end.py [--samples 12] [--long] [--layers 4] [--rounds 3] [--base FOLDER]
        [--skip_transformer_lens] [--skip_peers]

Each runs in a process of its own, in turn; wall and CPU seconds and peak memory are the kernel's figures for
that process, imports, loading and a warm compilation cache included. Prompts are those of real ARC tasks, up to
2,048 tokens; with --long those of common.long_rows that have 3,000 to 16,000. The Hugging Face script sorts prompts
by length, batches them (four; one where they are long), takes output_hidden_states and writes gzip pickles
(benchmarks/peers.py). TransformerLens holds all scores of a layer, so it is left out where prompts are long. --base
is a worktree of an older commit. Needs tests/requirements.txt and, for the last peer, "transformer-lens<4".
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    ROOT,
    WORKER_DTYPE,
    arc_rows,
    interleave_commands,
    long_rows,
    published,
    report,
    save_model,
    tokenized_rows,
    worker_command,
    write_stream,
)

LONG = (3000, 16_000)
MAX_SEQ_LENGTH = {False: 2048, True: 16_384}
BATCH_ROWS = {False: 4, True: 1}


def chosen_rows(count: int, long: bool) -> list[dict[str, Any]]:
    if not long:
        return arc_rows(count)
    rows = long_rows()
    fitting = [sample for sample in tokenized_rows(rows, LONG[1]) if sample.full_length <= LONG[1]]
    return [rows[each.sample_idx] for each in fitting if each.full_length >= LONG[0]][:count]


def pretend_hub(root: Path) -> Path:
    """A hub cache in which the model is Qwen/Qwen2.5-0.5B: TransformerLens takes its configuration from there."""
    repo = root / "hub" / "models--Qwen--Qwen2.5-0.5B"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / ("0" * 40)).symlink_to(root / "model")
    return root / "hub"


def commands(root: Path, stream: Path, model: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    length = str(MAX_SEQ_LENGTH[args.long])
    flags = ("--max_seq_length", length, "--shard_size_gb", str(args.shard_size_gb))
    checkouts = {"ours": ROOT} | ({"base": args.base.resolve()} if args.base else {})
    found = {
        name: worker_command(stream, model, root / name, *flags, checkout=checkout)
        for name, checkout in checkouts.items()
    }
    skip_last = args.skip_transformer_lens or args.long
    peers = 0 if args.skip_peers else 1 if skip_last else 2
    for peer in ("hugging_face", "transformer_lens")[:peers]:
        found[peer] = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), peer, str(stream), str(model)]
        found[peer] += [str(root / peer / "out"), str(args.shard_size_gb), length, str(BATCH_ROWS[args.long])]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--size", default="0.5B")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard_size_gb", type=float, default=0.25)
    parser.add_argument("--base", type=Path, help="a worktree of an older commit, to compare with")
    parser.add_argument("--skip_transformer_lens", action="store_true")
    parser.add_argument("--skip_peers", action="store_true", help="all but an older commit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stream = write_stream(root / "stream.jsonl", chosen_rows(args.samples, args.long))
        shape = published(args.size, args.layers)
        cases = commands(root, stream, save_model(root / "model", shape), args)
        hub = str(pretend_hub(root))
        warm_up = {"ours", "base"} & cases.keys()
        medians = interleave_commands(cases, args.rounds, root, warm_up, HF_HUB_CACHE=hub)
        count = len(stream.read_text().splitlines())
    wall_of_ours, cpu_of_ours, _ = medians["ours"]
    rows = [
        (name, f"{wall:.1f} s wall, {cpu:.1f} s CPU, {memory:.0f} MB peak")
        for name, (wall, cpu, memory) in medians.items()
    ]
    rows += [
        (f"{name} / ours", f"{wall / wall_of_ours:.2f} wall, {cpu / cpu_of_ours:.2f} CPU")
        for name, (wall, cpu, _) in medians.items()
        if name != "ours"
    ]
    kind = f"of {LONG[0]:,} to {LONG[1]:,} tokens" if args.long else f"up to {MAX_SEQ_LENGTH[False]:,} tokens"
    report(f"End to end, {count} prompts {kind}, {args.size} shape, {shape[2]} layers, {WORKER_DTYPE}", rows)


if __name__ == "__main__":
    main()
