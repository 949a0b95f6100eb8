"""Shards are compressed, named, uploaded and committed beside one another, each in its order."""

import threading

import pytest

from qwen_jax.run import background as run_background
from qwen_jax.run.background import BackgroundCommitter
from tests.waiting import until

WAIT_S = 30


class FakeCommitter:
    """Takes numbers for shards; each step waits until it is let go, and says when it has begun."""

    def __init__(self, fails_at: str = "") -> None:
        self.begun: dict[str, threading.Event] = {}
        self.let_go: dict[str, threading.Event] = {}
        steps = ("write", "name", "upload", "commit")
        for name in (f"{step} {number}" for step in steps for number in range(5)):
            self.begun[name], self.let_go[name] = threading.Event(), threading.Event()
        self.fails_at = fails_at
        self.done: list[str] = []

    def step(self, name: str) -> None:
        self.begun[name].set()
        assert self.let_go[name].wait(WAIT_S)
        if name == self.fails_at:
            raise OSError(name)
        self.done.append(name)

    def write(self, number: int) -> "FakeWritten":
        self.step(f"write {number}")
        return FakeWritten(number)

    def name(self, written: "FakeWritten") -> int:
        self.step(f"name {written.number}")
        return written.number

    def upload(self, number: int) -> None:
        self.step(f"upload {number}")

    def commit(self, number: int) -> None:
        self.step(f"commit {number}")

    def let_go_of(self, *steps: str) -> None:
        for name, event in self.let_go.items():
            if name.startswith(steps):
                event.set()


class FakeWritten:
    """What write returns; discarded when it can no longer be named."""

    discarded: list[int] = []  # noqa: RUF012  (a test looks at it right after)

    def __init__(self, number: int):
        self.number = number
        self.file = self

    def discard(self) -> None:
        self.discarded.append(self.number)


def test_a_shard_is_written_while_the_one_before_is_uploaded_and_the_next_one_fills():
    committer = FakeCommitter()
    with BackgroundCommitter(committer) as background:
        background.add(0)  # returns at once: the next shard fills meanwhile
        committer.let_go_of("write 0", "name 0")
        background.add(1)
        assert committer.begun["upload 0"].wait(WAIT_S) and committer.begun["write 1"].wait(WAIT_S)
        assert background.backlog == 2
        committer.let_go_of("")
        background.wait()
        assert background.backlog == 0


def test_shards_are_uploaded_at_once_and_committed_in_order(monkeypatch):
    monkeypatch.setattr(run_background, "UPLOADS", 3)
    committer = FakeCommitter()
    with BackgroundCommitter(committer) as background:
        committer.let_go_of("write", "name", "commit")
        for number in range(3):
            background.add(number)
        for number in range(3):
            assert committer.begun[f"upload {number}"].wait(WAIT_S)
        committer.let_go_of("upload 1", "upload 2")
        until(lambda: {"upload 1", "upload 2"} <= set(committer.done))
        assert not any(committer.begun[f"commit {number}"].is_set() for number in range(3))
        committer.let_go_of("upload 0")
        background.wait()
    assert [name for name in committer.done if name.startswith("commit")] == [
        "commit 0",
        "commit 1",
        "commit 2",
    ]


def test_a_slow_bucket_holds_the_run_back_instead_of_filling_memory_or_disk(monkeypatch):
    monkeypatch.setattr(run_background, "UPLOADS", 2)
    committer = FakeCommitter()
    with BackgroundCommitter(committer) as background:
        committer.let_go_of("write", "name")
        for number in range(3):
            background.add(number)
        fourth = threading.Thread(target=background.add, args=(3,))
        fourth.start()
        until(lambda: "write 2" in committer.done)
        assert committer.begun["upload 0"].wait(WAIT_S) and committer.begun["upload 1"].wait(WAIT_S)
        fourth.join(0.2)
        assert fourth.is_alive() and not committer.begun["name 2"].is_set()
        committer.let_go_of("upload 0", "commit 0")
        assert committer.begun["upload 2"].wait(WAIT_S)
        committer.let_go_of("")
        fourth.join(WAIT_S)
        background.wait()


@pytest.mark.parametrize(
    "step", ["write 1", "name 0", "name 1", "upload 0", "upload 1", "commit 0", "commit 1"]
)
def test_a_failure_ends_the_run_and_nothing_behind_it_is_committed(step):
    committer = FakeCommitter(step)
    committer.let_go_of("")
    FakeWritten.discarded.clear()
    with pytest.raises(OSError, match=step), BackgroundCommitter(committer) as background:
        for number in range(5):
            background.add(number)
        background.wait()
    failed = int(step[-1])
    assert not any(committer.begun[f"commit {number}"].is_set() for number in range(failed + 1, 5))
    if step.startswith("name"):
        assert not any(committer.begun[f"name {number}"].is_set() for number in range(failed + 1, 5))
    begun = [number for number in range(5) if committer.begun[f"write {number}"].is_set()]
    named = [number for number in begun if committer.begun[f"name {number}"].is_set()]
    unnamed = [number for number in begun if number not in named and f"write {number}" != step]
    assert FakeWritten.discarded == unnamed


@pytest.mark.parametrize("call", ["add", "wait"])
def test_a_failure_is_raised_though_an_older_shard_is_on_its_way_and_stops_what_is_tried_again(call):
    committer, stop = FakeCommitter("upload 1"), threading.Event()
    committer.let_go_of("write", "name", "upload 1")
    with pytest.raises(OSError, match="upload 1"), BackgroundCommitter(committer, stop) as background:
        background.add(0)
        background.add(1)
        until(lambda: background.backlog == 1)
        threading.Thread(target=lambda: stop.wait(WAIT_S) and committer.let_go_of("")).start()
        background.add(2) if call == "add" else background.wait()
    assert stop.is_set() and committer.done[-1] == "commit 0"
    assert not committer.begun["write 2"].is_set()
