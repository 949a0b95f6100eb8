"""What the benchmarks share: interleaved runs, medians, one line about the machine."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


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
