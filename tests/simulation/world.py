"""Several writers of one worker id on simulated machines, step by step, and whatever can happen to them.

Each writer is the real `take_up`, `Committer` and `GcsStore` in a thread of its own; only one thread runs at a time.
Each operation on a disk or the bucket is a step. A script says at which steps something happens; whatever it does
not say goes well. So a script is all there is to a failure, and a shorter one is a simpler failure.
"""

import contextlib
import functools
import gc
import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

from qwen_jax.data.prompts import SkippedSample
from qwen_jax.errors import ConfigError, StorageError, WriterConflictError
from qwen_jax.ledger.metadata import Ledger, RunIdentity
from qwen_jax.run import commit, resume, run_stats
from qwen_jax.run.places import Places
from qwen_jax.shards import statistics
from qwen_jax.storage import atomic, checksum, gcs, resumable
from tests.simulation.bucket import Bucket, Client, Http, arrive
from tests.simulation.disk import Disk, DiskOs, SimPath, machines, open_file
from tests.simulation.shards import LINES, SHARDS, filled, stats_file, stats_of, write_known_shard
from tests.simulation.watch import Violation, Watch

CHECKPOINT = "checkpoint_worker_5.json"
IDENTITY = RunIdentity(
    5, "stream", "model", {"seed": 1}, {"settings": {}, "activation_types": ["residual"], "layers": [0]}
)
STARTS = 250
"""More starts than this in one world mean that it does not come to an end."""

TROUBLE = ("io", "full", "lose", "late")
WEIGHTS = {
    "switch": 16,
    "kill": 14,
    "power": 4,
    "vanish": 1,
    "force": 3,
    "kill_other": 2,
    "bits": 1,
    "io": 2,
    "full": 1,
    "lose": 4,
    "late": 2,
    "arrive": 2,
    "clock": 1,
}


PLACES = {
    "": 4,
    "put": 4,
    "put sh": 4,
    "put m": 3,
    "put c": 2,
    "delete": 1,
    "list": 1,
    "rename": 1,
    "unlink": 1,
}
"""Beginnings of operations at which things happen more often than elsewhere, with weights."""
PATIENCE = 40
"""Steps that an event waits for its operation."""


@dataclass(frozen=True)
class Event:
    """What happens `gap` steps after the event before, at an operation that begins with `at`.

    number: which machine, how far a clock jumps, what a failing disk keeps.
    """

    gap: int
    at: str
    kind: str
    number: int = 0


@dataclass(frozen=True)
class Script:
    """A world: a machine for each entry of `bits`, which says what bits it computes, and what happens to it."""

    bits: tuple[int, ...]
    events: tuple[Event, ...]
    with_bucket: bool = True
    chunked: bool = False
    delete_local: bool = False
    at_once: int = 1
    """Shards that are on their way to the bucket at once."""

    @classmethod
    def random(cls, seed: int) -> "Script":
        rng = random.Random(seed)
        with_bucket = rng.random() < 0.85
        bits = tuple(rng.choices((0, 1), k=rng.choice((1, 2, 2, 3)) if with_bucket else 1))
        pace = rng.choice((1, 3, 8, 15))
        count = rng.randint(20, 120)
        kinds = rng.choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)
        places = rng.choices(list(PLACES), list(PLACES.values()), k=count)
        events = tuple(
            Event(int(rng.expovariate(1 / pace)), place, kind, rng.randrange(1000))
            for place, kind in zip(places, kinds, strict=True)
        )
        chunked, delete_local = rng.random() < 0.2, with_bucket and rng.random() < 0.3
        return cls(bits, events, with_bucket, chunked, delete_local, rng.randint(1, SHARDS))


class Died(BaseException):
    """The process of this thread is no more; nothing that it still tries has an effect."""


class Machine:
    """A disk, the bits that it computes, and the process that runs there, if any."""

    def __init__(self, number: int, bits: int):
        self.number, self.bits = number, bits
        self.disk = Disk()
        self.process: Process | None = None
        self.force = False
        self.finished = False

    @property
    def path(self) -> SimPath:
        return SimPath(f"/m{self.number}")


class Process:
    """One start of the worker, in a thread that runs only while it has the baton."""

    def __init__(self, world: "World", machine: Machine):
        self.world, self.machine = world, machine
        self.dead = False
        self.forced, machine.force = machine.force, False
        self.error: BaseException | None = None
        self.ended = False
        self._turn = threading.Lock()
        self._turn.acquire()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def proceed(self) -> None:
        """Runs it until it pauses or ends."""
        self.world.current = self
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        self.world.baton.acquire()

    def pause(self) -> None:
        self.world.baton.release()
        self._turn.acquire()
        if self.dead:
            raise Died

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self.world.live(self)
        except BaseException as error:  # noqa: BLE001  (the world looks at it)
            self.error = error
        self.ended = True
        self.world.baton.release()


class World:
    """Runs one script to its end; `crashes` counts how often a process died on the way."""

    def __init__(self, script: Script):
        self.script = script
        self._events = iter(script.events)
        self._due = next(self._events, None)
        self._due_from = self._due.gap if self._due else 0
        self.machines = [Machine(number, bits) for number, bits in enumerate(script.bits)]
        self.bucket = Bucket(self._before_request, self._changed, self._as_sent)
        self.watch = Watch(self.bucket.objects, CHECKPOINT)
        self.baton = threading.Semaphore(0)
        self.current: Process | None = None
        self.step = self.crashes = self.starts = 0
        self.clock = 0.0
        self.violation: Violation | None = None
        self._next: Machine = self.machines[0]
        self._paused: list[Process] = []

    def run(self) -> None:
        """Raises Violation."""
        machines.disks = {f"m{machine.number}": machine.disk for machine in self.machines}
        machines.before = self._before_disk
        try:
            while (machine := self._whose_turn()) is not None:
                self._give_turn(machine)
            self._check_end()
        finally:
            self._bury()

    def live(self, process: Process) -> None:
        """What a worker does, from its start to the end of its stream."""
        machine = process.machine
        places = self._places(machine)
        places.remove_leftovers()
        committer, _ = resume.take_up(
            IDENTITY,
            places,
            (0,),
            force_restart=process.forced,
            delete_local_after_upload=self.script.delete_local,
        )
        self._check_believed(committer, machine)
        while left := range(len(committer.ledger.shards), SHARDS)[: self.script.at_once]:
            shards = [filled(number, machine.bits) for number in left]
            self._store(committer, machine, [committer.name(committer.write(shard)) for shard in shards])
        if committer.ledger.status != "completed":
            last = SkippedSample(LINES - 1, "", "bad", 0, bad_record=True)
            committer.complete(LINES, [last])
        self._check_believed(committer, machine)

    def adopt(self, committer: commit.Committer, kept: Ledger, _stop: object) -> None:
        """In the place of resume's: some kept shards at once, as of new ones."""
        committer.take_over(kept)
        while left := range(len(committer.ledger.shards), len(kept.shards))[: self.script.at_once]:
            self._store(committer, self.current.machine, [kept.prefix(number + 1) for number in left])

    def _store(self, committer: commit.Committer, machine: Machine, named: list[Ledger]) -> None:
        """The last one overtakes the others. What is under way when one of them fails goes on."""
        under_way = [named[-1], *named[:-1]]
        try:
            committer.upload(under_way.pop(0))
            for ledger in named:
                if ledger in under_way:
                    committer.upload(under_way.pop(0))
                committer.commit(ledger)
                self._check_believed(committer, machine)
        except (StorageError, WriterConflictError):
            for ledger in under_way:
                with contextlib.suppress(StorageError, WriterConflictError):
                    committer.upload(ledger)
            raise

    def _places(self, machine: Machine) -> Places:
        output = machine.path / "out"
        store = None
        if self.script.with_bucket:
            store = gcs.GcsStore("bucket", "", stop=Waiting(self), budget_s=20.0)
            store._chunk_bytes = 400 if self.script.chunked else 10**6
        return Places(output, machine.path / "checkpoints" / CHECKPOINT, CHECKPOINT, store)

    def _check_believed(self, committer: commit.Committer, machine: Machine) -> None:
        """What a writer takes for durable is: in the bucket, or on its disk."""
        if self.script.with_bucket:
            self.watch.check_covered(committer.ledger)
        else:
            self.watch.check_local(machine.disk, str(machine.path), committer.ledger)

    def _whose_turn(self) -> Machine | None:
        if self.violation is not None:
            raise self.violation
        if not self._next.finished:
            return self._next
        left = next((machine for machine in self.machines if not machine.finished), None)
        if left is None and self._due is None and self.bucket.late:
            # One more start after what arrives late: a dead --force_restart's markers are no longer true.
            self.watch.late_arrived = True
            while self.bucket.late:
                arrive(self.bucket.late.pop())
            left = self.machines[0]
            left.finished = False
        if left is None and self._due is not None:
            left = self.machines[self.step % len(self.machines)]
            left.finished, left.force = False, True
            self.watch.forget_disk()
        return left

    def _give_turn(self, machine: Machine) -> None:
        if machine.process is None:
            self.starts += 1
            if self.starts > STARTS:
                raise Violation("the writers do not come to an end")
            machine.process = Process(self, machine)
        process = machine.process
        process.proceed()
        if process.ended:
            machine.process = None
            process.join()
            self._judge(machine, process.error)

    def _judge(self, machine: Machine, error: BaseException | None) -> None:
        """Whether a process may end so."""
        if isinstance(error, Violation):
            raise error
        if error is None:
            machine.finished = True
        elif isinstance(error, ConfigError) and not self.script.with_bucket:
            # Without a bucket a --force_restart that is cut off leaves shards that nothing explains.
            machine.force = True
        elif isinstance(error, Died):
            if not self.script.with_bucket:
                self.watch.check_disk(machine.disk, str(machine.path))
        elif not isinstance(error, WriterConflictError | StorageError):
            code = getattr(error, "exit_code", 1)
            raise Violation(f"a start ends with {type(error).__name__} ({code}): {error}") from error
        elif isinstance(error, WriterConflictError) and self._is_alone(machine):
            raise Violation(f"refused though nobody else is there: {error}") from error

    def _is_alone(self, machine: Machine) -> bool:
        """Whether nothing of anybody else's can have come between."""
        others = any(other.process is not None or other is not machine for other in self.machines)
        return not others and not self.bucket.late and not self.watch.late_arrived

    def _check_end(self) -> None:
        machine = self.machines[0]
        if self.script.with_bucket:
            self.watch.check_completed()
        else:
            self.watch.check_completed_locally(machine.disk, str(machine.path))

    def _bury(self) -> None:
        """Ends the threads of all processes that are left."""
        for process in [*self._paused, *(machine.process for machine in self.machines)]:
            if process is not None and not process.ended:
                process.dead = True
                process.proceed()
                process.join()

    # What can happen at a step.

    def _before_disk(self, what: str) -> str | None:
        trouble = self._next_event(what)
        return trouble if trouble in ("io", "full") else None

    def _before_request(self, what: str) -> str | None:
        trouble = self._next_event(what)
        reads = what.startswith(("stat", "get", "list"))
        return "io" if trouble == "late" and reads else trouble

    def _next_event(self, what: str) -> str | None:
        """Counts the step; what is to go wrong with it, if anything."""
        process = self.current
        if process.dead or self.violation is not None:
            raise Died
        self.step += 1
        event, since = self._due, self.step - self._due_from
        if event is None or since < 0 or (since < PATIENCE and not what.startswith(event.at)):
            return None
        self._due = next(self._events, None)
        self._due_from = self.step + (self._due.gap if self._due else 0)
        if event.kind in TROUBLE:
            return event.kind
        getattr(self, f"_{event.kind}")(process, event.number)
        return None

    def _changed(self, name: str) -> None:
        try:
            self.watch.changed(name, self.current.forced)
        except Violation as violation:
            self.violation = self.violation or violation

    def _as_sent(self, work: Callable[[], object]) -> Callable[[], object]:
        sender = self.current

        def arrives() -> object:
            at_work, self.current = self.current, sender
            try:
                return work()
            finally:
                self.current = at_work

        return arrives

    def _kill(self, process: Process, number: int) -> None:
        self.crashes += 1
        process.dead = True
        if number % 2:
            self._next = self.machines[number // 2 % len(self.machines)]
        raise Died

    def _power(self, process: Process, number: int) -> None:
        process.machine.disk.lose_power(random.Random(number))
        self._kill(process, number)

    def _vanish(self, process: Process, number: int) -> None:
        process.machine.disk.vanish()
        self.watch.forget_disk()
        self._kill(process, number)

    def _force(self, process: Process, number: int) -> None:
        process.machine.force = True
        self.watch.forget_disk()
        self._kill(process, number)

    def _bits(self, process: Process, number: int) -> None:
        """The next start has another batch size."""
        process.machine.bits ^= 1
        self._kill(process, number)

    def _kill_other(self, process: Process, number: int) -> None:
        machine = self.machines[number % len(self.machines)]
        if machine.process not in (None, process):
            self.crashes += 1
            machine.process.dead = True
            self._paused.append(machine.process)
            machine.process = None
            if number % 3 == 0:
                machine.disk.vanish()

    def _switch(self, process: Process, number: int) -> None:
        machine = self.machines[number % len(self.machines)]
        if machine.finished:
            machine.finished = False
            machine.force = number % 5 == 0
        if machine is not process.machine:
            self._next = machine
            process.pause()

    def _arrive(self, process: Process, number: int) -> None:
        """A request arrives whose sender has given up."""
        if self.bucket.late:
            self.watch.late_arrived = True
            arrive(self.bucket.late.pop(number % len(self.bucket.late)))

    def _clock(self, process: Process, number: int) -> None:
        self.clock += (number - 500) * 10


@dataclass
class Waiting:
    """In the place of the event that ends waits: no time passes but on the world's clock."""

    world: World
    waits: int = field(default=0)

    def wait(self, seconds: float) -> bool:
        self.world.clock += seconds
        return False


class OneByOne:
    """In the place of a pool of threads."""

    def __init__(self, *size: int, thread_name_prefix: str = ""): ...

    def __enter__(self) -> "OneByOne":
        return self

    def __exit__(self, *error: object) -> None: ...

    def shutdown(self, **options: object) -> None: ...

    def map(self, work: Callable, items: Any) -> Iterator:
        return map(work, items)

    def submit(self, work: Callable, *arguments: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:  # noqa: BLE001  (it is raised where the result is asked for)
            future.set_exception(error)
        return future


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """The real code stands on the simulated disks, bucket and clocks."""
    now = SimpleNamespace(monotonic=lambda: _world().clock)
    patches = [
        mock.patch.object(atomic, "os", DiskOs),
        mock.patch.object(atomic, "open", open_file, create=True),
        mock.patch.object(atomic, "Path", lambda path: path),
        # Without line ends and blanks, which Python itself adds slowly.
        mock.patch.object(atomic, "json", SimpleNamespace(dumps=lambda obj, **_: json.dumps(obj))),
        mock.patch.object(checksum, "open", open_file, create=True),
        mock.patch.object(gcs, "open", open_file, create=True),
        mock.patch.object(gcs, "time", now),
        mock.patch.object(gcs, "random", SimpleNamespace(uniform=lambda low, high: high)),
        mock.patch.object(gcs.GcsStore, "_connect", lambda store: Client(_world().bucket)),
        mock.patch.object(resumable, "requests", SimpleNamespace(Session=lambda: Http(_world().bucket))),
        mock.patch.object(resume, "ThreadPoolExecutor", OneByOne),
        mock.patch.object(resume, "_adopt", lambda *arguments: _world().adopt(*arguments)),
        mock.patch.object(commit, "write_shard", write_known_shard),
        mock.patch.object(run_stats, "load_shard", lambda path: path.read_bytes()),
        mock.patch.object(run_stats, "shard_stats", lambda data, kinds: stats_of(data)),
        mock.patch.object(commit, "stats_bytes", stats_file),
        mock.patch.object(statistics, "parse_stats", functools.cache(statistics.parse_stats)),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


_running: list[World] = []


def _world() -> World:
    return _running[-1]


def search(crashes: int, seed: int = 0) -> tuple[int, Violation | None, int]:
    """Runs worlds from `seed` on until so many processes have died, or one breaks a promise.

    Returns how many did, the violation if any, and the last seed.
    """
    died = 0
    gc.freeze()  # what the tests have imported need not be looked through again and again
    with simulated():
        while True:
            world = World(Script.random(seed))
            violation = _violation(world)
            died += world.crashes
            if violation is not None or died >= crashes:
                return died, violation, seed
            seed += 1


def explained(seed: int) -> str:
    """What a seed's world fails by, as the shortest script that still fails."""
    with simulated():
        script = shrink(Script.random(seed))
        events = "".join(f"\n  {event}" for event in script.events)
        return f"seed {seed}: {fails(script)}\n{replace(script, events=())}{events}"


def _violation(world: World) -> Violation | None:
    _running.append(world)
    try:
        world.run()
    except Violation as violation:
        return violation
    finally:
        _running.pop()
    return None


def run(script: Script) -> World:
    """Runs a script inside `simulated`; raises Violation."""
    world = World(script)
    violation = _violation(world)
    if violation is not None:
        raise violation
    return world


def fails(script: Script) -> Violation | None:
    """What a script breaks, inside `simulated`."""
    return _violation(World(script))


def shrink(script: Script) -> Script:
    """The script without the events that its failure does not need."""
    size = max(1, len(script.events) // 2)
    while True:
        before, start = script, 0
        while start < len(script.events):
            shorter = next(filter(fails, _without(script, start, size)), None)
            if shorter is None:
                start += size
            else:
                script = shorter
        if size == 1 and script == before:
            return script
        size = max(1, size // 2)


def _without(script: Script, start: int, size: int) -> Iterator[Script]:
    """The script without some events; with and without the steps up to them."""
    before, gone, after = (
        script.events[:start],
        script.events[start : start + size],
        script.events[start + size :],
    )
    if after:
        steps = sum(event.gap for event in gone) + len(gone)
        later = replace(after[0], gap=after[0].gap + steps)
        yield replace(script, events=(*before, later, *after[1:]))
    yield replace(script, events=(*before, *after))
