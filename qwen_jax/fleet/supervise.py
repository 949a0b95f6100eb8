"""Keeps VMs alive and workers on them until all streams are done.

Each round looks at the machines and at the bucket, and acts on workers that need it. A worker whose checkpoint says
`completed` is never touched, and where the bucket cannot be read nobody is.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from qwen_jax.errors import BadDataError, ConfigError, UsageError
from qwen_jax.fleet.command import CommandError
from qwen_jax.fleet.gcloud import ABSENT, LOST, READY, WAITING, Machines
from qwen_jax.ledger.names import CHECKPOINT_PATTERN, PROGRESS_NAME
from qwen_jax.ledger.progress_record import one_line
from qwen_jax.ledger.schema import COMPLETED, FAILED, RUNNING

FINAL_EXITS = tuple(kind.exit_code for kind in (UsageError, BadDataError, ConfigError))
"""Ends of a worker that another start does not change."""
LONGEST_WAIT_S = 1800.0
SILENCE_S = 900.0
BLIND_ROUNDS = 10
COUNT_EVERY_S = 600.0
_NEEDS_SOMEBODY = {"STOPPED": ": somebody stopped it; start it, or delete it and it is made again"}


class Clock:
    """The time, and waiting; a test has its own."""

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, futures: Collection[Future], seconds: float) -> None:
        """Until all are done, but no longer than so many seconds."""
        wait(futures, timeout=seconds)


@dataclass(frozen=True)
class Policy:
    """parallel: starts at once, and creations at once. backoff_s doubles from try to try; max_attempts: tries without
    any progress."""

    poll_s: float = 60.0
    backoff_s: float = 60.0
    max_attempts: int = 20
    parallel: int = 8


@dataclass
class _Tracked:
    """What the supervisor remembers of a worker. started_at: its last start on the machine that is there now.
    samples: what its checkpoint covered when it last grew, at grew_at. word: gcloud's for its machine."""

    attempts: int = 0
    not_before: float = 0.0
    started_at: float | None = None
    samples: float = 0.0
    grew_at: float = 0.0
    word: str = ""


@dataclass(frozen=True)
class Outcome:
    """finished: ids of completed workers. given_up: id -> why."""

    finished: frozenset[int]
    given_up: Mapping[int, str]


@dataclass
class Supervisor:
    """`run` returns when every worker is finished or given up; raises CommandError when gcloud has failed for
    BLIND_ROUNDS rounds."""

    cloud: Machines
    workers: Sequence[int]
    policy: Policy
    clock: Clock
    say: Callable[[str], None]
    pool: Callable[[int], Executor] = ThreadPoolExecutor
    _tracked: dict[int, _Tracked] = field(default_factory=dict)
    _finished: set[int] = field(default_factory=set)
    _given_up: dict[int, str] = field(default_factory=dict)
    _busy: dict[int, Future] = field(default_factory=dict)
    _count_at: float = 0.0

    def __post_init__(self) -> None:
        # Creations take minutes: starts must not stand behind them.
        self._starts, self._creations = (self.pool(self.policy.parallel) for _ in range(2))

    def run(self) -> Outcome:
        self._tracked = {worker: _Tracked() for worker in self.workers}
        blind = 0
        with self._starts, self._creations:
            while True:
                try:
                    self._round()
                    blind = 0
                except CommandError as error:
                    blind += 1
                    self.say(f"nothing done this round: {error}")
                    if blind == BLIND_ROUNDS:
                        raise
                if not self._open():
                    return Outcome(frozenset(self._finished), dict(self._given_up))
                self.clock.sleep(self.policy.poll_s)

    def _open(self) -> list[int]:
        return [each for each in self.workers if each not in self._finished and each not in self._given_up]

    def _round(self) -> None:
        """Looks first, all of it; then acts, and waits for that no longer than until the next round."""
        self._collect()
        checkpoints = self.cloud.documents(CHECKPOINT_PATTERN)
        for worker in self._open():
            if checkpoints.get(worker, {}).get("status") == COMPLETED:
                self._finished.add(worker)
                self.say(f"worker {worker}: completed")
        if not self._open():
            return
        records = self._records()
        machines = self.cloud.machines()
        now = self.clock.time()
        for worker in self._open():
            record = None if records is None else records.get(worker, {})
            self._note_progress(self._tracked[worker], checkpoints.get(worker, {}), record or {}, now)
            if worker not in self._busy:
                self._act(worker, machines, record, now)
        self._say_count(machines, now)
        self.clock.wait(self._busy.values(), self.policy.poll_s)
        self._collect()

    def _collect(self) -> None:
        """Forgets what has been done; an error in it that is no CommandError is a defect, and raised."""
        for worker in [worker for worker, future in self._busy.items() if future.done()]:
            self._busy.pop(worker).result()

    def _records(self) -> Mapping[int, dict[str, Any]] | None:
        """None where they cannot be read: machines are looked after without them, but nobody is called silent."""
        try:
            return self.cloud.documents(PROGRESS_NAME)
        except CommandError as error:
            self.say(f"progress records not read this round: {error}")
            return None

    def _say_count(self, machines: Mapping[str, tuple[str, str]], now: float) -> None:
        """Now and then one line of how it stands."""
        if now < self._count_at:
            return
        self._count_at = now + COUNT_EVERY_S
        words = Counter(
            machines.get(self.cloud.name(worker), (ABSENT, "absent"))[1] for worker in self._open()
        )
        machines_are = ", ".join(f"{count} {word}" for word, count in sorted(words.items()))
        self.say(
            f"{len(self._finished)} of {len(self.workers)} workers completed, {len(self._given_up)} given up; "
            f"machines of the others: {machines_are or 'none'}"
        )

    def _act(
        self,
        worker: int,
        machines: Mapping[str, tuple[str, str]],
        record: Mapping[str, Any] | None,
        now: float,
    ) -> None:
        """Lets something be done for an unfinished worker, if it needs it now."""
        tracked = self._tracked[worker]
        state, word = machines.get(self.cloud.name(worker), (ABSENT, "absent"))
        if state == WAITING and word != tracked.word:
            self.say(f"worker {worker}: {self.cloud.name(worker)} is {word}{_NEEDS_SOMEBODY.get(word, '')}")
        tracked.word = word
        if not self._is_due(worker, state, record, now):
            return
        tracked.attempts += 1
        tracked.not_before = now + min(self.policy.backoff_s * 2 ** (tracked.attempts - 1), LONGEST_WAIT_S)
        if state == READY:
            self._busy[worker] = self._starts.submit(self._start, worker, tracked, now)
        else:
            self._busy[worker] = self._creations.submit(self._create, worker, tracked, state)

    def _is_due(self, worker: int, state: str, record: Mapping[str, Any] | None, now: float) -> bool:
        """Whether to act for it; gives it up where another try would change nothing."""
        tracked = self._tracked[worker]
        known = record or {}
        if _failed_since(tracked.started_at, known) and known.get("exit_code") in FINAL_EXITS:
            self._give_up(
                worker, f"it failed with exit {known['exit_code']}: {one_line(str(known.get('message')))}"
            )
            return False
        if now < tracked.not_before or not self._needs_action(state, tracked, record, now):
            return False
        if tracked.attempts >= self.policy.max_attempts:
            self._give_up(worker, f"{tracked.attempts} tries without progress; its machine is {tracked.word}")
            return False
        return True

    def _needs_action(
        self, state: str, tracked: _Tracked, record: Mapping[str, Any] | None, now: float
    ) -> bool:
        if state != READY:
            return state in (LOST, ABSENT)
        if tracked.started_at is None:
            return True
        if record is None:
            return False
        heard = max(_number(record, "updated_at"), tracked.started_at, tracked.grew_at)
        return _failed_since(tracked.started_at, record) or now - heard > SILENCE_S

    def _note_progress(
        self, tracked: _Tracked, checkpoint: Mapping[str, Any], record: Mapping[str, Any], now: float
    ) -> None:
        """A worker that gets on has its tries back."""
        samples = _number(checkpoint, "total_samples_processed")
        if samples > tracked.samples:
            tracked.samples, tracked.grew_at = samples, now
        runs = record.get("status") == RUNNING and _number(record, "tokens") > 0
        heard = max(tracked.grew_at, _number(record, "updated_at") if runs else 0.0)
        if tracked.started_at is not None and heard > tracked.started_at:
            tracked.attempts = 0

    def _start(self, worker: int, tracked: _Tracked, now: float) -> None:
        try:
            self.cloud.start(worker)
        except CommandError as error:
            self.say(f"worker {worker}: not started: {error}")
            return
        tracked.started_at = now
        self.say(f"worker {worker}: started on {self.cloud.name(worker)}")

    def _create(self, worker: int, tracked: _Tracked, state: str) -> None:
        """A machine that is lost still has its name, so it is deleted first."""
        tracked.started_at = None
        name = self.cloud.name(worker)
        attempt = f"try {tracked.attempts} of {self.policy.max_attempts}"
        self.say(f"worker {worker}: {name} is {tracked.word}; creating it ({attempt})")
        try:
            if state == LOST:
                self.cloud.delete(worker)
            self.cloud.create(worker)
        except CommandError as error:
            self.say(f"worker {worker}: {name} not created: {error}")

    def _give_up(self, worker: int, why: str) -> None:
        self._given_up[worker] = why
        self.say(f"worker {worker}: given up: {why}")


def _failed_since(started_at: float | None, record: Mapping[str, Any]) -> bool:
    """An older failure is what somebody may have mended before this supervisor was started."""
    failed = record.get("status") == FAILED
    return failed and started_at is not None and _number(record, "updated_at") > started_at


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    if not isinstance(value, int | float) or not abs(value) < 1e15:  # nan is not
        return 0.0
    return float(value)
