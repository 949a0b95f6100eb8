"""Many workers on one machine, each with its own devices or its share of the cores."""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Protocol

from qwen_jax.errors import UsageError, WriterConflictError
from qwen_jax.files import storage_errors
from qwen_jax.fleet.supervise import FINAL_EXITS, LONGEST_WAIT_S, Clock, Policy

CHECKOUT = Path(__file__).parents[2]
_FINAL = {*FINAL_EXITS, WriterConflictError.exit_code}
_LOOK_EVERY_S = 0.1


class Process(Protocol):
    """A running worker."""

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        ...

    def terminate(self) -> None:
        """SIGTERM."""
        ...


Spawn = Callable[[int, int], Process]
"""Worker id and slot -> the running worker."""


@dataclass(frozen=True)
class Share:
    """What the worker in one slot gets. cores: None leaves it all of them."""

    variables: Mapping[str, str]
    cores: frozenset[int] | None = None


def shares(slots: int, gpus: Sequence[str], tpu_chips: int, cores: Sequence[int]) -> list[Share]:
    """One share a slot: a GPU or a TPU chip where there are any, else cores; with more slots than these, they share.

    gpus: as CUDA_VISIBLE_DEVICES names them. Raises UsageError for more slots than TPU chips: these cannot be shared.
    """
    if gpus:
        each = -(-slots // len(gpus))
        memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / each:.2f}"} if each > 1 else {}
        return [Share({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)], **memory}) for slot in range(slots)]
    if tpu_chips:
        if slots > tpu_chips:
            raise UsageError(
                f"--parallel {slots}: this machine has {tpu_chips} TPU chips, and none can be shared"
            )
        one = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        return [Share({"TPU_VISIBLE_CHIPS": str(slot), **one}) for slot in range(slots)]
    if slots >= len(cores):
        return [Share({}, frozenset([cores[slot % len(cores)]])) for slot in range(slots)]
    return [Share({}, frozenset(cores[slot::slots])) for slot in range(slots)]


def spawner(environment: Mapping[str, str], portions: Sequence[Share], logs: Path) -> Spawn:
    """Starts ./launch_worker.sh; what it prints is added to `logs`/worker_N.log."""
    make_logs(logs)

    def spawn(worker: int, slot: int) -> subprocess.Popen:
        share = portions[slot]
        own = {"WORKER_ID": str(worker), **share.variables}
        if environment.get("GCS_BUCKET"):
            own["UPLOAD_TO_GCS"] = "true"
        path = logs / f"worker_{worker}.log"
        with storage_errors("write", path), path.open("ab") as log, _on(share.cores):
            return subprocess.Popen(
                [CHECKOUT / "launch_worker.sh"],
                env={**environment, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches it through us, as SIGTERM
            )

    return spawn


def make_logs(folder: Path) -> None:
    """Raises StorageError."""
    with storage_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _on(cores: frozenset[int] | None) -> Iterator[None]:
    """Starts processes on these cores only: a child has its parent's."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)


@dataclass(frozen=True)
class Ended:
    """done: workers that completed. failed: id -> last exit code. stopped: whether somebody asked for the end."""

    done: frozenset[int]
    failed: Mapping[int, int]
    stopped: bool = False


@dataclass
class LocalFleet:
    """`run` keeps `slots` workers going until all have ended.

    is_supervised: a worker that was killed or met trouble that may pass is started again, as `policy` allows.
    """

    workers: Iterable[int]
    slots: int
    spawn: Spawn
    is_supervised: bool
    policy: Policy
    clock: Clock
    say: Callable[[str], None]
    stop: Event = field(default_factory=Event)
    _waiting: list[int] = field(default_factory=list)
    _not_before: dict[int, float] = field(default_factory=dict)
    _attempts: dict[int, int] = field(default_factory=dict)
    _started_at: dict[int, float] = field(default_factory=dict)
    _running: dict[int, tuple[int, Process]] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    _failed: dict[int, int] = field(default_factory=dict)

    def run(self) -> Ended:
        self._waiting = list(self.workers)
        try:
            while (self._waiting or self._running) and not self.stop.is_set():
                self._reap()
                self._fill_slots()
                self.clock.sleep(_LOOK_EVERY_S)
        finally:
            self._end()
        return Ended(frozenset(self._done), dict(self._failed), self.stop.is_set())

    def _fill_slots(self) -> None:
        now = self.clock.time()
        for slot in range(self.slots):
            ready = [each for each in self._waiting if self._not_before.get(each, 0.0) <= now]
            if slot in self._running or not ready:
                continue
            self._waiting.remove(ready[0])
            self._running[slot] = (ready[0], self.spawn(ready[0], slot))
            self._started_at[ready[0]] = now
            self.say(f"worker {ready[0]}: started")

    def _reap(self) -> None:
        for slot, (worker, process) in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[slot]
                self._ended(worker, code)

    def _ended(self, worker: int, code: int) -> None:
        lived = self.clock.time() - self._started_at[worker]
        attempts = 0 if lived > LONGEST_WAIT_S else self._attempts.get(worker, 0)
        if code == 0:
            self._done.add(worker)
            self.say(f"worker {worker}: completed")
        elif self.is_supervised and code not in _FINAL and attempts < self.policy.max_attempts:
            wait = min(self.policy.backoff_s * 2**attempts, LONGEST_WAIT_S)
            self._attempts[worker], self._not_before[worker] = attempts + 1, self.clock.time() + wait
            self._waiting.append(worker)
            self.say(f"worker {worker}: {ending(code)}; starting it again in {wait:.0f} s")
        else:
            self._failed[worker] = code
            self.say(f"worker {worker}: {ending(code)}")

    def _end(self) -> None:
        """Lets every worker that runs come to a consistent end."""
        for _, process in self._running.values():
            process.terminate()
        while self._running:
            for slot, (worker, process) in list(self._running.items()):
                if (code := process.poll()) is not None:
                    del self._running[slot]
                    if code == 0:
                        self._done.add(worker)
            self.clock.sleep(_LOOK_EVERY_S)


def ending(code: int) -> str:
    """`exit 75`, or `killed by signal 9`."""
    return f"killed by signal {-code}" if code < 0 else f"exit {code}"
