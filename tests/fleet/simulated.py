"""A fleet of TPU VMs in fast forward: the supervisor and the monitor against a simulated cloud and clock.

    python -m tests.fleet.simulated [--seed 7] [--html page.html --at_hours 26.7]

It prints what the fleet took. The cloud is drawn from the seed, at the rates of a public trace of spot machines:
skypilot-org/spot-traces at 221da1a, preemption/4-node/aws-08-03-2023, of four V100 machines in each of three zones of
AWS (no such trace of TPUs was found). In it 600 machines were lost in 3,066 machine hours, and a zone had none to give
136 times, for 2.7 hours in the mean and 5.9 hours apart. The rest is assumed.
"""

import argparse
import heapq
import itertools
import json
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_jax.fleet.command import CommandError
from qwen_jax.fleet.gcloud import LOST, READY, WAITING
from qwen_jax.fleet.monitor import WorkerState, look, mark_slow
from qwen_jax.fleet.page import make_page
from qwen_jax.fleet.supervise import Clock, Outcome, Policy, Supervisor
from qwen_jax.ledger.names import CHECKPOINT_PATTERN
from qwen_jax.ledger.progress_record import ProgressRecord
from qwen_jax.ledger.schema import COMPLETED, FAILED, IN_PROGRESS, RUNNING, STARTING
from qwen_jax.ledger.worker_files import WorkerFiles

HOUR = 3600.0
BEGINNING = 1_800_000_000.0
MACHINE_LIFE_S = 3066 / 600 * HOUR
OUTAGE_S, BETWEEN_OUTAGES_S = 2.7 * HOUR, 5.9 * HOUR
# Assumed.
CREATION_S, REFUSAL_S, DELETION_S, SSH_S = (120.0, 360.0), 90.0, 60.0, 20.0
START_S = (120.0, 300.0)
"""From ssh to the first sample: packages, weights, compilation."""
SHARD_S = 600.0
"""Work in a shard."""
WORK_S = (22 * HOUR, 30 * HOUR)
# One layer of a model of width 5,120 in bfloat16, at about 170 tokens/s a machine: a shard of 1 GB is SHARD_S of work.
MODEL, LAYER = "Qwen/Qwen2.5-32B", "40"
SAMPLES, TOKENS_A_SAMPLE, BYTES_A_SHARD = 16_000, 1000, 780_000_000
POINT_EVERY_S = 1800.0
"""Of the throughput's history; a worker keeps a point a minute, as long as there is room."""
FAILS, DIES = 0.03, 0.02
"""Shares of starts that end with exit 75, and that die in silence within some hours."""
CONTROL_LIFE_S, CONTROL_GAP_S = 16 * HOUR, (30.0, 1800.0)
LONGEST_S = 21 * 24 * HOUR


@dataclass
class Machine:
    """It is ready from `ready_at` until `lost_at`; then it stays listed, or vanishes."""

    ready_at: float
    lost_at: float
    vanishes: bool

    def is_ready(self, now: float) -> bool:
        return self.ready_at <= now < self.lost_at

    def state(self, now: float) -> tuple[str, str] | None:
        if now >= self.lost_at:
            return None if self.vanishes else (LOST, "PREEMPTED")
        return (READY, "READY") if now >= self.ready_at else (WAITING, "CREATING")


@dataclass
class Process:
    """A start of a worker: computes from `begins_at` to `ends_at`, when it fails or dies, if it is not done before."""

    begins_at: float
    ends_at: float
    fails: bool
    from_s: float
    control: int


@dataclass
class Worker:
    """work_s: of its whole stream. durable_s: what its checkpoint covers. repeated_s: work that was lost."""

    work_s: float
    durable_s: float = 0.0
    repeated_s: float = 0.0
    process: Process | None = None
    record: ProgressRecord | None = None
    finished_at: float | None = None
    without_machine_s: float = 0.0
    machine_s: float = 0.0
    is_known_finished: bool = False
    settled_at: float = BEGINNING

    def __post_init__(self) -> None:
        self.checkpoint = {"status": IN_PROGRESS, "total_samples_processed": 0, "total_shards": 0}

    def store(self, seconds: float, *, is_all: bool) -> None:
        """What the checkpoint covers from now on."""
        self.durable_s = seconds
        self.checkpoint = {
            "status": COMPLETED if is_all else IN_PROGRESS,
            "total_samples_processed": self.samples(seconds),
            "total_shards": math.ceil(seconds / SHARD_S),
        }

    def samples(self, seconds: float) -> int:
        return int(SAMPLES * min(seconds / self.work_s, 1.0))


class ControlLostError(Exception):
    """The supervisor's machine has died."""


@dataclass
class World:
    """A zone and its machines, the bucket, and the workers. wrong: what nobody may ever do, and was done."""

    seed: int
    count: int
    now: float = BEGINNING
    control: int = 0
    refused: int = 0
    preempted: int = 0
    wrong: list[str] = field(default_factory=list)
    machines: dict[int, Machine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.workers = {worker: Worker(self.random.uniform(*WORK_S)) for worker in range(self.count)}
        self.control_dies_at = self.now + self.random.expovariate(1 / CONTROL_LIFE_S)
        self._outages = list(self._draw_outages())

    def _draw_outages(self) -> Iterator[float]:
        """When the zone's capacity ends, comes back, ends, ..."""
        when = self.now
        while when < self.now + LONGEST_S:
            for mean in (BETWEEN_OUTAGES_S, OUTAGE_S):
                when += self.random.expovariate(1 / mean)
                yield when

    @property
    def has_capacity(self) -> bool:
        return bisect_right(self._outages, self.now) % 2 == 0

    def machine_of(self, worker: int) -> Machine | None:
        """None where nothing is listed."""
        machine = self.machines.get(worker)
        return None if machine is None or machine.state(self.now) is None else machine

    def create(self, worker: int) -> float:
        """Seconds that it takes."""
        self._touch(worker, "creates")
        if self.machine_of(worker) is not None:
            self.wrong.append(f"creates the machine of worker {worker}, which is there")
        ready_at = self.now + self.random.uniform(*CREATION_S)
        life = self.random.expovariate(1 / MACHINE_LIFE_S)
        self.machines[worker] = Machine(ready_at, ready_at + life, self.random.random() < 0.3)
        return ready_at - self.now

    def delete(self, worker: int) -> None:
        self._touch(worker, "deletes")
        if self.machines.pop(worker).lost_at > self.now:
            self.wrong.append(f"deletes the machine of worker {worker}, which works")
        self.workers[worker].process = None

    def start(self, number: int) -> None:
        self._touch(number, "starts")
        worker, machine = self.workers[number], self.machine_of(number)
        if machine is None or not machine.is_ready(self.now):
            raise CommandError("ssh: connect to host port 22: Connection refused")
        if worker.process is not None:
            self._refuse(number, worker.process)
            return
        begins_at = self.now + self.random.uniform(*START_S)
        draw = self.random.random()
        dies_at = begins_at + self.random.uniform(0, 6 * HOUR) if draw < FAILS + DIES else math.inf
        ends_at = begins_at if draw < FAILS else dies_at
        worker.process = Process(begins_at, ends_at, draw < FAILS, worker.durable_s, self.control)
        before, samples = worker.record, worker.samples(worker.durable_s)
        worker.record = ProgressRecord(number, STARTING, samples, SAMPLES, 0, 0, 0, self.now, self.now)
        worker.record.go_on_from(before)

    def _refuse(self, number: int, process: Process) -> None:
        """As a worker refuses a second start. Only a supervisor that has just begun may not know that it runs."""
        self.refused += 1
        if process.control == self.control:
            self.wrong.append(f"starts worker {number}, which runs")
        process.control = self.control

    def _touch(self, number: int, verb: str) -> None:
        if self.workers[number].is_known_finished:
            self.wrong.append(f"{verb} worker {number}, which is finished")
        self.settle(number)

    def settle_all(self) -> None:
        for number, worker in self.workers.items():
            if worker.finished_at is None:
                self.settle(number)

    def settle(self, number: int) -> None:
        """Lets happen what has happened to a worker since it was settled last."""
        worker, machine = self.workers[number], self.machines.get(number)
        since, worker.settled_at = worker.settled_at, self.now
        if since == self.now or worker.finished_at is not None:
            return
        if machine is not None and since < machine.lost_at <= self.now:
            self.preempted += 1
        end = self.now
        if worker.process is not None:
            assert machine is not None and worker.record is not None
            self._compute(worker, worker.process, worker.record, machine)
            end = worker.finished_at or end
        there = 0.0 if machine is None else max(0.0, min(end, machine.lost_at) - max(since, machine.ready_at))
        worker.machine_s += there
        worker.without_machine_s += max(0.0, end - since - there)

    def _compute(self, worker: Worker, process: Process, record: ProgressRecord, machine: Machine) -> None:
        needed = process.begins_at + worker.work_s - process.from_s
        until = min(self.now, needed, process.ends_at, machine.lost_at)
        done_s = process.from_s + max(0.0, until - process.begins_at)
        if until == needed:
            worker.finished_at = until
            worker.store(worker.work_s, is_all=True)
        elif (shards_s := done_s // SHARD_S * SHARD_S) > worker.durable_s:
            worker.store(shards_s, is_all=False)
        self._note(worker, process, record, until, done_s)
        if until < self.now:
            worker.process = None
            worker.repeated_s += max(0.0, done_s - worker.durable_s)
        if until == process.ends_at and process.fails:
            record.status, record.exit_code, record.message = FAILED, 75, "gs://bucket: 503"

    def _note(
        self, worker: Worker, process: Process, record: ProgressRecord, until: float, done_s: float
    ) -> None:
        """The record that the worker leaves once a minute."""
        record.updated_at = max(record.updated_at, until - until % 60)
        if until <= process.begins_at:
            return
        record.status = RUNNING
        record.samples_done = worker.samples(done_s)
        record.shards = worker.checkpoint["total_shards"]
        record.tokens = (record.samples_done - worker.samples(process.from_s)) * TOKENS_A_SAMPLE
        if worker.durable_s > process.from_s:
            record.last_shard_at = process.begins_at + worker.durable_s - process.from_s
        if not record.history or record.updated_at >= record.history[-1][0] + POINT_EVERY_S:
            record.add_point(record.updated_at)


@dataclass
class SimulatedClock(Clock):
    """Time goes on when somebody waits for it; a supervisor whose machine dies meanwhile hears no more of it."""

    world: World
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def time(self) -> float:
        return self.world.now

    def sleep(self, seconds: float) -> None:
        self._go_to(self.world.now + seconds)

    def wait(self, futures: Collection[Future], seconds: float) -> None:
        end = self.world.now + seconds
        while self._events and self._events[0][0] <= end and not all(each.done() for each in futures):
            self._go_to(self._events[0][0])
        if not all(each.done() for each in futures):
            self._go_to(end)

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.world.now + seconds, next(self._numbers), event))

    def _go_to(self, when: float) -> None:
        while self._events and self._events[0][0] <= when:
            at, _, event = heapq.heappop(self._events)
            self._pass(at)
            event()
        self._pass(when)

    def _pass(self, when: float) -> None:
        if self.world.control_dies_at <= when:
            self.world.now = self.world.control_dies_at
            raise ControlLostError
        self.world.now = max(self.world.now, when)


@dataclass
class SimulatedCloud:
    """What a supervisor sees of the world. took: seconds that the calls since then took."""

    world: World
    took: float = 0.0

    def name(self, worker: int) -> str:
        return f"tpu-worker-{worker}"

    def machines(self) -> dict[str, tuple[str, str]]:
        now = self.world.now
        found = ((self.name(worker), machine.state(now)) for worker, machine in self.world.machines.items())
        return {name: state for name, state in found if state is not None}

    def documents(self, name: str) -> dict[int, dict[str, Any]]:
        workers = self.world.workers
        self.world.settle_all()
        if name != CHECKPOINT_PATTERN:
            return {number: vars(each.record) for number, each in workers.items() if each.record is not None}
        for worker in workers.values():
            worker.is_known_finished = worker.finished_at is not None
        return {number: each.checkpoint for number, each in workers.items()}

    def start(self, worker: int) -> None:
        self.took += SSH_S
        self.world.start(worker)

    def create(self, worker: int) -> None:
        if not self.world.has_capacity:
            self.took += REFUSAL_S
            raise CommandError('{ "code": 8, "message": "There is no more capacity in the zone" }')
        self.took += self.world.create(worker)

    def delete(self, worker: int) -> None:
        self.took += DELETION_S
        self.world.delete(worker)


class SimulatedPool(Executor):
    """So many calls at once; each has its effect when it begins, and is done when its time is over."""

    def __init__(self, size: int, clock: SimulatedClock, cloud: SimulatedCloud):
        self._free, self._clock, self._cloud = size, clock, cloud
        self._waiting: list[tuple[Future, Callable[[], None]]] = []

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        self._waiting.append((future, lambda: function(*args, **kwargs)))
        self._begin()
        return future

    def _begin(self) -> None:
        while self._free and self._waiting:
            future, function = self._waiting.pop(0)
            self._free -= 1
            self._cloud.took = 0.0
            function()
            self._clock.after(self._cloud.took, lambda future=future: self._end(future))  # type: ignore[misc]

    def _end(self, future: Future) -> None:
        self._free += 1
        future.set_result(None)
        self._begin()


@dataclass(frozen=True)
class Report:
    """What a fleet took. Times in hours; machine: until the worker was finished."""

    hours: float
    machine: float
    work: float
    repeated: float
    without_machine: float
    preempted: int
    controls: int
    refused: int

    def lines(self, workers: int, price: float) -> Iterator[str]:
        yield f"workers          {workers}, all completed after {self.hours:.1f} hours"
        yield f"machines         {self.machine:,.0f} hours, {self.machine * price:,.0f} at {price} an hour"
        yield f"pre-emptions     {self.preempted}; the supervisor's machine died {self.controls} times"
        yield f"done twice       {self.repeated:.1f} hours, {100 * self.repeated / self.work:.1f}% of the work"
        mean = self.without_machine / workers
        yield f"without machine  {self.without_machine:,.0f} hours, {mean:.1f} a worker"
        yield f"refused starts   {self.refused}"


@dataclass
class Fleet:
    """looks: called with each round of the supervisor, which the monitor may look at."""

    seed: int
    count: int = 64
    poll_s: float = 1200.0
    looks: Callable[[World], None] = lambda world: None
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world = World(self.seed, self.count)

    def run(self) -> Outcome:
        """Starts the supervisor again whenever its machine has died. A zone may be without capacity for a day, so its
        tries are many."""
        world = self.world
        policy = Policy(poll_s=self.poll_s, max_attempts=60)
        while True:
            clock, cloud = SimulatedClock(world), SimulatedCloud(world)

            def pool(size: int, clock: SimulatedClock = clock, cloud: SimulatedCloud = cloud) -> Executor:
                return SimulatedPool(size, clock, cloud)

            try:
                return Supervisor(cloud, range(self.count), policy, clock, self._hear, pool).run()
            except ControlLostError:
                world.control += 1
                world.now += world.random.uniform(*CONTROL_GAP_S)
                world.control_dies_at = world.now + world.random.expovariate(1 / CONTROL_LIFE_S)

    def _hear(self, line: str) -> None:
        self.said.append(line)
        self.looks(self.world)

    def report(self) -> Report:
        workers = self.world.workers.values()
        return Report(
            hours=(max(each.finished_at or math.inf for each in workers) - BEGINNING) / HOUR,
            machine=sum(each.machine_s for each in workers) / HOUR,
            work=sum(each.work_s for each in workers) / HOUR,
            repeated=sum(each.repeated_s for each in workers) / HOUR,
            without_machine=sum(each.without_machine_s for each in workers) / HOUR,
            preempted=self.world.preempted,
            controls=self.world.control,
            refused=self.world.refused,
        )


@dataclass(frozen=True)
class WorldFiles:
    """The bucket as the monitor reads it."""

    world: World
    where: str = "gs://bucket/activations"

    def names(self) -> list[str]:
        return []

    def read(self, name: str) -> bytes | None:
        folder, _, file = name.partition("/")
        worker = int(folder.removeprefix("tpu_"))
        seen = self.world.workers[worker]
        if file == "metadata.json":
            norms = {"residual": {LAYER: {"norm_mean": 180.0 + worker / 10}}}
            size = seen.checkpoint["total_shards"] * BYTES_A_SHARD
            known = {"model": {"name": MODEL}, "totals": {"bytes": size}, "statistics": norms}
            return json.dumps(known).encode()
        if file == "progress.json":
            return None if seen.record is None else seen.record.to_bytes()
        return json.dumps({"worker_id": worker} | seen.checkpoint).encode() if seen.durable_s else None


def states(world: World, workers: Iterable[int] | None = None) -> list[WorkerState]:
    """As the monitor sees the fleet now, or some of it."""
    world.settle_all()
    files = WorldFiles(world)
    return mark_slow(
        [look(WorkerFiles.stored(files, worker), world.now) for worker in workers or world.workers]
    )


def page_at(hours: float, path: Path) -> Callable[[World], None]:
    """Writes the monitor's page at the first look after so many hours."""

    def write(world: World) -> None:
        if world.now >= BEGINNING + hours * HOUR and not path.exists():
            path.write_text(make_page(states(world), world.now, place="gs://your-bucket/activations"))

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--poll_s", type=float, default=60.0)
    parser.add_argument("--price", type=float, default=1.35, help="of a machine, an hour")
    parser.add_argument("--html", type=Path, help="the monitor's page goes here; it must not be there")
    parser.add_argument("--at_hours", type=float, default=26.7)
    args = parser.parse_args()
    looks = page_at(args.at_hours, args.html) if args.html else lambda world: None
    fleet = Fleet(args.seed, args.workers, args.poll_s, looks)
    outcome = fleet.run()
    assert len(outcome.finished) == args.workers, outcome.given_up
    for line in fleet.report().lines(args.workers, args.price):
        print(line)


if __name__ == "__main__":
    main()
