"""Kills a worker over and over, and compares the bucket it leaves with that of an undisturbed run.

    python -m tests.run_worker.torture --kills 500 --seed 1

A life is one stream from its first start to exit code 0, with SIGKILLs between: at a named failpoint, after
a random time, or at a random request to the bucket. In some rounds the local disk is lost. To save the
imports, most starts are forks of a process that has imported everything and run `main` of the script; every
tenth is the real command line. A seed fixes the plan; what a kill by time hits depends on the machine.
"""

import argparse
import collections
import gzip
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from qwen_jax.run.failpoints import NAMES, VARIABLE
from tests.fake_gcs import FakeGcs, crc32c
from tests.run_worker.conftest import CloudWorkspace, make_inputs, tree
from tests.run_worker.starts import Start

CHECKPOINT = "checkpoint_worker_5.json"
EXEC_EVERY = 10
ONE_START_S = 300.0
UNITS = [
    ["opened"],
    ["shard_described", "adopting", "adopted"],
    *([name] for name in NAMES if name not in ("opened", "shard_described", "adopting", "adopted")),
]
"""Failpoints that must be hit; those of a unit one after the other, with the disk kept between."""


@dataclass
class Result:
    """What came of it. different: life, file name and what differs, for every file that is not identical."""

    seed: int
    kills: int = 0
    starts: int = 0
    lives: int = 0
    lost: int = 0
    duplicated: int = 0
    ahead: int = 0
    torn: int = 0
    wiped: int = 0
    seconds: float = 0.0
    different: list[str] = field(default_factory=list)
    hits: collections.Counter = field(default_factory=collections.Counter)

    def __str__(self) -> str:
        identical = "no: " + "; ".join(self.different) if self.different else "yes"
        return (
            f"kills {self.kills}, lost {self.lost}, duplicated {self.duplicated}, byte-identical {identical}, "
            f"seed {self.seed} ({self.lives} lives, {self.starts} starts, {self.wiped} disks lost, checkpoint "
            f"ahead of data {self.ahead}, torn files {self.torn}, {self.seconds:.0f} s)\n"
            f"killed at: {', '.join(f'{name} {count}' for name, count in sorted(self.hits.items()))}"
        )


@dataclass(frozen=True)
class Kill:
    """How a start shall die: at `failpoint` (name:n), after `seconds`, or at the `request`th request."""

    failpoint: str = ""
    seconds: float = 0.0
    request: int = 0

    @property
    def name(self) -> str:
        return self.failpoint.partition(":")[0] or ("time" if self.seconds else "request")


class Torture:
    """Lives and deaths of one worker; `run` returns the Result."""

    def __init__(self, inputs: tuple[Path, Path, Path], folder: Path, seed: int):
        self.result = Result(seed)
        self._inputs = inputs
        self._folder = folder
        self._rng = random.Random(seed)
        self._units = [list(unit) for unit in UNITS]
        self._rng.shuffle(self._units)
        self._units.sort(key=lambda unit: unit != ["opened"])
        self._log = folder / "log.txt"

    def run(self, kills: int) -> Result:
        """At least `kills` kills, each failpoint among them, every life to its end."""
        started = time.monotonic()
        self._undisturbed()
        while self.result.kills < kills or self._units:
            self.result.lives += 1
            with FakeGcs() as server:
                worker = CloudWorkspace(
                    *self._inputs, self._folder / f"life_{self.result.lives}", server=server
                )
                self._live(worker, kills)
            shutil.rmtree(worker.root)
        self.result.seconds = time.monotonic() - started
        return self.result

    def _undisturbed(self) -> None:
        """Measures a start, and keeps what every life must end with."""
        with FakeGcs() as server:
            worker = CloudWorkspace(*self._inputs, self._folder / "undisturbed", server=server)
            self._start(worker, Kill(), ())  # fills the compilation cache
            self._wanted = worker.stored()
            started, requests = time.monotonic(), len(server.requests)
            shutil.rmtree(worker.root)
            server.objects("bucket").clear()
            assert self._start(worker, Kill(), ()) == 0, self._log.read_text()
            self._usual_s = time.monotonic() - started
            self._usual_requests = len(server.requests) - requests
            assert worker.stored() == self._wanted, "two undisturbed runs differ"

    def _live(self, worker: CloudWorkspace, kills: int) -> None:
        """One stream from its first start to exit code 0."""
        flags = () if self._units or self._rng.random() < 0.7 else ("--delete_local_after_upload",)
        unit: list[str] = []
        while True:
            if not unit and self._units:
                unit = list(self._units[0])
            kill = self._next_kill(unit) if unit or self.result.kills < kills else Kill()
            code = self._start(worker, kill, flags)
            if code == 0:
                break
            assert code == -9, f"exit {code} after {kill}, seed {self.result.seed}:\n{self._last_words()}"
            self._note_kill(kill, unit)
            self.result.ahead += checkpoint_is_ahead(worker.stored())
            self.result.torn += sum(path.read_bytes() != self._wanted[path.name] for path in worker.shards())
            if len(unit) in (0, 3):
                self._lose_disk(worker)
        self._compare(worker, bool(flags))

    def _next_kill(self, unit: list[str]) -> Kill:
        if unit:
            return Kill(failpoint=f"{unit[0]}:{self._rng.choice((1, 1, 2)) if len(unit) == 1 else 1}")
        kind = self._rng.choice(("failpoint", "seconds", "request"))
        if kind == "failpoint":
            return Kill(failpoint=f"{self._rng.choice(list(NAMES))}:{self._rng.randint(1, 4)}")
        if kind == "seconds":
            return Kill(seconds=self._rng.uniform(0.02, 1.1 * self._usual_s))
        return Kill(request=self._rng.randint(1, self._usual_requests))

    def _note_kill(self, kill: Kill, unit: list[str]) -> None:
        self.result.kills += 1
        self.result.hits[kill.name] += 1
        if unit:
            unit.pop(0)
            if not unit:
                self._units.pop(0)

    def _start(self, worker: CloudWorkspace, kill: Kill, flags: tuple[str, ...]) -> int:
        """Runs the worker until it ends or is killed; returns its exit code."""
        self.result.starts += 1
        if kill.failpoint:
            worker = worker.having(**{VARIABLE: kill.failpoint})
        began, arrived = time.monotonic(), len(worker.server.requests)
        forked = self.result.starts % EXEC_EVERY != 0
        process = Start(worker.command(*flags), worker.environment(), self._log, forked=forked)
        while process.poll() is None:
            waited = time.monotonic() - began
            late = kill.seconds and waited >= kill.seconds
            if late or (kill.request and len(worker.server.requests) - arrived >= kill.request):
                process.kill()
            assert waited < ONE_START_S, f"the worker hangs: {self._last_words()}"
            time.sleep(0.002)
        return process.poll()

    def _lose_disk(self, worker: CloudWorkspace) -> None:
        """In a third of the rounds: another machine, or one without one of the folders."""
        lost = self._rng.choice((["activations"], ["checkpoints"], ["activations", "checkpoints"]))
        if self._rng.random() < 1 / 3:
            self.result.wiped += 1
            for name in lost:
                shutil.rmtree(worker.root / name, ignore_errors=True)

    def _compare(self, worker: CloudWorkspace, only_in_bucket: bool) -> None:
        """Counts samples, and compares bucket and local mirror byte for byte; keeps what differs."""
        stored, result = worker.stored(), self.result
        expected, found = count_samples(self._wanted), count_samples(stored)
        result.lost += sum((expected - found).values())
        result.duplicated += sum((found - expected).values())
        problems = differences(self._wanted, stored)
        mirror = tree(worker.output) | {CHECKPOINT: worker.checkpoint.read_bytes()}
        if only_in_bucket:
            mirror = {name: data for name, data in mirror.items() if not name.startswith("shard_")}
        problems += differences({name: stored.get(name) for name in mirror}, mirror)
        result.different += [f"life {result.lives}: {problem}" for problem in problems]
        if problems:
            keep_both(self._folder / f"different_{result.lives}", self._wanted, stored)

    def _last_words(self) -> str:
        return self._log.read_text()[-3000:]


def checkpoint_is_ahead(stored: dict[str, bytes]) -> bool:
    """Whether the checkpoint covers a shard that is not there as metadata.json describes it."""
    if CHECKPOINT not in stored:
        return False
    covered = json.loads(stored[CHECKPOINT])["total_shards"]
    entries = json.loads(stored["metadata.json"])["shards"]
    listed = [(entry["filename"], entry["crc32c"]) for entry in entries[:covered]]
    return len(listed) < covered or any(crc32c(stored.get(name, b"")) != crc for name, crc in listed)


def count_samples(stored: dict[str, bytes]) -> collections.Counter:
    """How often each (layer, sample_idx) stands in the shards."""
    return collections.Counter(
        (layer, record["sample_idx"])
        for name, data in stored.items()
        if name.startswith("shard_")
        for layer, records in pickle.loads(gzip.decompress(data)).items()
        for record in records
    )


def differences(wanted: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Names of missing, extra and changed files; of a changed shard, whether its content differs too."""
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is extra" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        if wanted[name] != found[name]:
            same = name.endswith(".gz") and gzip.decompress(wanted[name]) == gzip.decompress(found[name])
            problems.append(f"{name} differs{' but only in its compression' if same else ''}")
    return sorted(problems)


def keep_both(folder: Path, wanted: dict[str, bytes], found: dict[str, bytes]) -> None:
    """Leaves both trees on the disk for whoever wants to understand a difference."""
    for kind, files in (("wanted", wanted), ("found", found)):
        (folder / kind).mkdir(parents=True)
        for name, data in files.items():
            (folder / kind / name).write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = Path(tempfile.mkdtemp(prefix="torture_"))
    (folder / "inputs").mkdir()
    result = Torture(make_inputs(folder / "inputs"), folder, args.seed).run(args.kills)
    print(result)
    sound = not (result.lost or result.duplicated or result.ahead or result.torn or result.different)
    if sound:
        shutil.rmtree(folder)
    else:
        print(f"kept: {folder}")
    sys.exit(not sound)


if __name__ == "__main__":
    main()
