"""Keeps VMs alive and workers on them until all streams are done.

Each round looks at the machines and at the bucket, and acts on workers that need it. A worker whose checkpoint says
`completed` is never touched, and where the bucket cannot be read nobody is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from qwen_jax.fleet.command import CommandError, call
from qwen_jax.fleet.gcloud import ABSENT, LOST, READY, Vms, machine_states, read_documents

FINAL_EXITS = (2, 65, 78)
"""Ends of a worker that another start does not change."""
LONGEST_WAIT_S = 1800.0
SILENCE_S = 900.0
BLIND_ROUNDS = 10


class Clock:
    """The time, and waiting; a test has its own."""

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Policy:
    """parallel: gcloud calls at once. backoff_s doubles from try to try; max_attempts: tries without any progress."""

    poll_s: float = 60.0
    backoff_s: float = 60.0
    max_attempts: int = 20
    parallel: int = 8


@dataclass
class _Care:
    """What the supervisor remembers of a worker. started_at: its last start on the machine that is there now.
    samples: what its checkpoint covered when it last grew, at grew_at."""

    attempts: int = 0
    not_before: float = 0.0
    started_at: float | None = None
    samples: float = 0.0
    grew_at: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """finished: ids of completed workers. given_up: id -> why."""

    finished: frozenset[int]
    given_up: Mapping[int, str]


@dataclass
class Supervisor:
    """`run` returns when every worker is finished or given up; raises CommandError when gcloud has been of no use for
    BLIND_ROUNDS rounds."""

    vms: Vms
    workers: Sequence[int]
    environment: Mapping[str, str]
    policy: Policy
    clock: Clock
    say: Callable[[str], None]
    _care: dict[int, _Care] = field(default_factory=dict)
    _finished: set[int] = field(default_factory=set)
    _given_up: dict[int, str] = field(default_factory=dict)

    def run(self) -> Outcome:
        self._care = {worker: _Care() for worker in self.workers}
        blind = 0
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
        """Looks first, all of it; then acts."""
        bucket, prefix = self.environment["GCS_BUCKET"], self.environment.get("GCS_PREFIX") or "activations"
        checkpoints = read_documents(bucket, prefix, "checkpoint_worker_*.json")
        for worker in self._open():
            if checkpoints.get(worker, {}).get("status") == "completed":
                self._finished.add(worker)
                self.say(f"worker {worker}: completed")
        if not self._open():
            return
        records = read_documents(bucket, prefix, "progress.json")
        machines = machine_states(self.vms)
        now = self.clock.time()
        for worker in self._open():
            self._note_progress(self._care[worker], checkpoints.get(worker, {}), records.get(worker, {}), now)
        actions = [
            action
            for worker in self._open()
            if (action := self._decide(worker, machines, records.get(worker, {}), now)) is not None
        ]
        with ThreadPoolExecutor(self.policy.parallel) as pool:
            list(pool.map(lambda action: action(), actions))

    def _decide(
        self, worker: int, machines: Mapping[str, tuple[str, str]], record: Mapping[str, Any], now: float
    ) -> Callable[[], None] | None:
        """What to do for an unfinished worker now."""
        care = self._care[worker]
        state, word = machines.get(self.vms.name(worker), (ABSENT, "absent"))
        if _failed_since(care.started_at, record) and record.get("exit_code") in FINAL_EXITS:
            self._give_up(worker, f"it failed with exit {record['exit_code']}: {record.get('message')}")
            return None
        if now < care.not_before or not self._needs_action(state, care, record, now):
            return None
        if care.attempts >= self.policy.max_attempts:
            self._give_up(worker, f"{care.attempts} tries without progress; its machine is {word}")
            return None
        care.attempts += 1
        care.not_before = now + min(self.policy.backoff_s * 2 ** (care.attempts - 1), LONGEST_WAIT_S)
        if state == READY:
            return lambda: self._start(worker, care, now)
        return lambda: self._create(worker, care, state, word)

    def _needs_action(self, state: str, care: _Care, record: Mapping[str, Any], now: float) -> bool:
        if state in (LOST, ABSENT):
            return True
        if state != READY:
            return False
        if care.started_at is None:
            return True
        heard = max(_number(record, "updated_at"), care.started_at, care.grew_at)
        return _failed_since(care.started_at, record) or now - heard > SILENCE_S

    def _note_progress(
        self, care: _Care, checkpoint: Mapping[str, Any], record: Mapping[str, Any], now: float
    ) -> None:
        """A worker that gets on has its tries back."""
        samples = _number(checkpoint, "total_samples_processed")
        if samples > care.samples:
            care.samples, care.grew_at = samples, now
        runs = record.get("status") == "running"
        heard = max(care.grew_at, _number(record, "updated_at") if runs else 0.0)
        if care.started_at is not None and heard > care.started_at:
            care.attempts = 0

    def _start(self, worker: int, care: _Care, now: float) -> None:
        try:
            call(self.vms.start_command(worker, self.environment))
        except CommandError as error:
            self.say(f"worker {worker}: not started: {error}")
            return
        care.started_at = now
        self.say(f"worker {worker}: started on {self.vms.name(worker)}")

    def _create(self, worker: int, care: _Care, state: str, word: str) -> None:
        """A machine that is lost still has its name, so it is deleted first."""
        care.started_at = None
        name = self.vms.name(worker)
        attempt = f"try {care.attempts} of {self.policy.max_attempts}"
        self.say(f"worker {worker}: {name} is {word}; creating it ({attempt})")
        try:
            if state == LOST:
                call(self.vms.delete_command(worker))
            call(self.vms.create_command(worker))
        except CommandError as error:
            self.say(f"worker {worker}: {name} not created: {error}")

    def _give_up(self, worker: int, why: str) -> None:
        self._given_up[worker] = why
        self.say(f"worker {worker}: given up: {why}")


def _failed_since(started_at: float | None, record: Mapping[str, Any]) -> bool:
    """An older failure is what somebody may have mended before this supervisor was started."""
    failed = record.get("status") == "failed"
    return failed and started_at is not None and _number(record, "updated_at") > started_at


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
