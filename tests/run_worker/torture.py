"""Kills a worker over and over, and compares the bucket it leaves with that of an undisturbed run.

A life is one stream from its first start to exit code 0, with SIGKILLs between: at a named failpoint, after
a random time, or at a random request to the bucket. In some rounds the local disk is lost. In others the worker is
stopped (SIGSTOP) at a random request, a rival on another disk runs to its end or is killed, and the worker goes on
(SIGCONT). Where stops are asked for, half of the lives have shards above 8 MiB, which go up in chunks, in half of the
lives rivals compute other bits, and requests fail in every way all the time. To save the imports, most starts are forks
of a process that has imported everything and run `main` of the script; every tenth is the real command line. A seed
fixes the plan; what a kill by time hits depends on the machine.
"""

import collections
import gzip
import json
import pickle
import random
import shutil
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwen_jax.errors import WriterConflictError
from qwen_jax.run.failpoints import NAMES, VARIABLE
from qwen_jax.storage.gcs import CHUNK_BYTES
from tests.fake_gcs import FakeGcs, Fault, crc32c
from tests.run_worker.conftest import CloudWorkspace, tree
from tests.run_worker.starts import Start

CHECKPOINT = "checkpoint_worker_5.json"
EXEC_EVERY = 10
ONE_START_S = 300.0
BIG_LINES = 8
BIG_FLAGS = ("--activation_type", "residual", "attn", "mlp", "--shard_size_gb", "0.011")
"""The stream repeated so often, and all of it stored, makes shards above 8 MiB."""
FAULTS = [
    ("status", {"status": 503}),
    ("status", {"status": 429}),
    ("reset", {"keep": 1000}),
    ("lose_reply", {}),
    ("cut", {}),
    ("short", {"method": "PUT", "keep": 1000}),
    ("expire", {"method": "PUT"}),
    ("garble", {"method": "POST", "path": "uploadType=multipart"}),
]
FAULTS_A_LIFE = 12
UNITS = [
    ["opened"],
    ["shard_described", "adopting", "checkpoint_local"],
    *([name] for name in NAMES if name not in ("opened", "shard_described", "adopting")),
]
"""Failpoints that must be hit; those of a unit one after the other, with the disk kept between."""


@dataclass
class Result:
    """What came of it. different: life, file name and what differs, for every file that is not identical."""

    seed: int
    kills: int = 0
    stops: int = 0
    overtaken: int = 0
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
            f"kills {self.kills}, stops {self.stops} ({self.overtaken} overtaken), lost {self.lost}, "
            f"duplicated {self.duplicated}, byte-identical {identical}, "
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
    stop: bool = False

    @property
    def name(self) -> str:
        if self.stop:
            return "stop"
        return self.failpoint.partition(":")[0] or ("time" if self.seconds else "request")


@dataclass(frozen=True)
class Life:
    """How the lives of one kind are: their inputs and flags, and what an undisturbed one leaves."""

    stream: Path
    flags: tuple[str, ...]
    wanted: dict[str, bytes]
    usual_s: float
    usual_requests: int


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

    def run(self, kills: int, stops: int = 0) -> Result:
        """At least `kills` kills, each failpoint among them, and `stops` stops, every life to its end."""
        started = time.monotonic()
        self._kills, self._stops = kills, stops
        kinds = [self._undisturbed(self._inputs[1], ())]
        if stops:
            kinds.append(self._undisturbed(self._big_stream(), BIG_FLAGS))
            assert max(map(len, kinds[1].wanted.values())) > CHUNK_BYTES, "no shard goes up in chunks"
        while self._is_left or self._units:
            self.result.lives += 1
            self._life = kinds[self.result.lives % len(kinds) if not self._units else 0]
            self._other_bits = bool(stops) and not self._units and self._rng.random() < 0.5
            with FakeGcs() as server:
                self._plan_faults(server)
                self._live(self._worker(server, f"life_{self.result.lives}"))
            shutil.rmtree(self._folder / f"life_{self.result.lives}")
        self.result.seconds = time.monotonic() - started
        return self.result

    @property
    def _is_left(self) -> bool:
        return self.result.kills < self._kills or self.result.stops < self._stops

    def _worker(self, server: FakeGcs, name: str) -> CloudWorkspace:
        model, _, cache = self._inputs
        return CloudWorkspace(model, self._life.stream, cache, self._folder / name, server=server)

    def _big_stream(self) -> Path:
        path = self._folder / "big_005.jsonl"
        path.write_bytes(self._inputs[1].read_bytes() * BIG_LINES)
        return path

    def _plan_faults(self, server: FakeGcs) -> None:
        """Where stops are asked for, requests of every kind fail too."""
        for _ in range(FAULTS_A_LIFE if self._stops and not self._units else 0):
            kind, details = self._rng.choice(FAULTS)
            nth = self._rng.randint(1, 3 * self._life.usual_requests)
            server.faults.append(Fault(kind, nth=nth, times=self._rng.choice((1, 1, 2)), **details))

    def _undisturbed(self, stream: Path, flags: tuple[str, ...]) -> Life:
        """Measures a start, and keeps what every life must end with."""
        self._life = Life(stream, flags, {}, 0.0, 0)
        with FakeGcs() as server:
            worker = self._worker(server, "undisturbed")
            self._start(worker, Kill(), ())  # fills the compilation cache
            wanted = worker.stored()
            started, requests = time.monotonic(), len(server.requests)
            shutil.rmtree(worker.root)
            server.objects("bucket").clear()
            assert self._start(worker, Kill(), ()) == 0, self._log.read_text()
            assert worker.stored() == wanted, "two undisturbed runs differ"
            shutil.rmtree(worker.root)
            return replace(
                self._life,
                wanted=wanted,
                usual_s=time.monotonic() - started,
                usual_requests=len(server.requests) - requests,
            )

    def _live(self, worker: CloudWorkspace) -> None:
        """One stream from its first start to exit code 0."""
        flags = () if self._units or self._rng.random() < 0.7 else ("--delete_local_after_upload",)
        unit: list[str] = []
        while True:
            if not unit and self._units:
                unit = list(self._units[0])
            kill = self._next_kill(unit) if unit or self._is_left else Kill()
            code = self._start(worker, kill, flags)
            if code == 0:
                break
            if code in (75, 76) and self._stops:
                continue  # a rival was there, or one request failed too often
            assert code == -9, f"exit {code} after {kill}, seed {self.result.seed}:\n{self._last_words()}"
            self._note_kill(kill, unit)
            self.result.ahead += checkpoint_is_ahead(worker.stored())
            if not self._other_bits:
                wanted = self._life.wanted
                self.result.torn += sum(path.read_bytes() != wanted[path.name] for path in worker.shards())
            if len(unit) in (0, 3):
                self._lose_disk(worker)
        self._compare(worker, bool(flags))

    def _next_kill(self, unit: list[str]) -> Kill:
        if unit:
            return Kill(failpoint=f"{unit[0]}:{self._rng.choice((1, 1, 2)) if len(unit) == 1 else 1}")
        if self.result.stops < self._stops and (self.result.kills >= self._kills or self._rng.random() < 0.5):
            return Kill(request=self._rng.randint(1, self._life.usual_requests), stop=True)
        kind = self._rng.choice(("failpoint", "seconds", "request"))
        if kind == "failpoint":
            return Kill(failpoint=f"{self._rng.choice(list(NAMES))}:{self._rng.randint(1, 4)}")
        if kind == "seconds":
            return Kill(seconds=self._rng.uniform(0.02, 1.1 * self._life.usual_s))
        return Kill(request=self._rng.randint(1, self._life.usual_requests))

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
        command = worker.command(*self._life.flags, *flags)
        process = Start(command, worker.environment(), self._log, forked=forked)
        while process.poll() is None:
            waited = time.monotonic() - began
            late = kill.seconds and waited >= kill.seconds
            if late or (kill.request and len(worker.server.requests) - arrived >= kill.request):
                if kill.stop:
                    return self._overtake(worker, process)
                process.kill()
            assert waited < ONE_START_S, f"the worker hangs: {self._last_words()}"
            time.sleep(0.002)
        return process.poll()

    def _overtake(self, worker: CloudWorkspace, process: Start) -> int:
        """Stops a worker, lets a rival run to its end or to a random request, and lets the worker go on."""
        process.send_signal(signal.SIGSTOP)
        self.result.stops += 1
        rival = worker.elsewhere(f"rival_{self.result.stops}")
        request = self._rng.choice((0, self._rng.randint(1, self._life.usual_requests)))
        flags = ("--batch_size", "1") if self._other_bits else ()
        code = self._start(rival, Kill(request=request), flags)
        self.result.kills += code == -signal.SIGKILL
        assert code in (0, 75, 76, -signal.SIGKILL), f"the rival ends with {code}: {self._last_words()}"
        process.send_signal(signal.SIGCONT)
        code = process.wait(ONE_START_S)
        assert code in (0, 75, 76), f"exit {code} after a stop, seed {self.result.seed}: {self._last_words()}"
        self.result.overtaken += code == WriterConflictError.exit_code
        return code

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
        wanted = self._life.wanted
        expected, found = count_samples(wanted), count_samples(stored)
        result.lost += sum((expected - found).values())
        result.duplicated += sum((found - expected).values())
        if self._other_bits:
            # A shard may be the worker's or a rival's, but each as metadata.json describes it.
            result.ahead += checkpoint_is_ahead(stored)
            completed = json.loads(stored["metadata.json"])["status"] == "completed"
            result.different += [] if completed else [f"life {result.lives}: it is not completed"]
            return
        problems = differences(wanted, stored)
        mirror = tree(worker.output) | {CHECKPOINT: worker.checkpoint.read_bytes()}
        if only_in_bucket:
            mirror = {name: data for name, data in mirror.items() if not name.startswith("shard_")}
        problems += differences({name: stored.get(name) for name in mirror}, mirror)
        result.different += [f"life {result.lives}: {problem}" for problem in problems]
        if problems:
            keep_both(self._folder / f"different_{result.lives}", wanted, stored)

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
