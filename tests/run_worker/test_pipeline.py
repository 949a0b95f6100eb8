"""The stages of a run work at once, hold a bounded amount, keep the order, and end the run when one fails."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.data.steps import Step, StepShape, lay_into_steps
from qwen_jax.model.capture import RowResult, TapRows
from qwen_jax.prefetch import prefetch
from qwen_jax.run import commit as run_commit
from qwen_jax.run.commit import BackgroundCommitter
from qwen_jax.run.pipeline import STEPS_IN_FLIGHT, CapturedSample, captured_samples
from tests.waiting import until

SHAPE = StepShape(tokens=256, positions=128)
WAIT_S = 30


def tokenized(index: int, length: int) -> TokenizedSample:
    ids = np.arange(length, dtype=np.int32) + 1000 * index + 1
    return TokenizedSample(index, ids, np.zeros(length, np.int32), None, "", "", False, 0, length)


class FakeDevice:
    """Gives each token's id as its activation, two channels wide, and counts the steps that were started."""

    def __init__(self) -> None:
        self.started = 0

    def __call__(self, step: Step) -> "FakeStep":
        self.started += 1
        return FakeStep(step)


class FakeStep:
    def __init__(self, step: Step):
        self.step = step

    def rows(self) -> list[RowResult]:
        starts, _ = self.step.blocks()
        results = []
        for row, tokens_T in enumerate(self.step.tokens_XT):
            kept_XR = self.step.kept_XR
            kept = tokens_T if kept_XR is None else tokens_T[kept_XR[row]]
            stored_CRD = np.repeat(kept[None, :, None], 2, axis=-1).astype(np.float32)
            sums_CED = np.zeros((1, starts[:, row].size, 2), np.float32)
            results.append(
                RowResult({"residual": TapRows((stored_CRD,), (stored_CRD[..., 0],), (sums_CED,) * 3)})
            )
        return results


def run(
    lengths: list[int], device: FakeDevice, first: int = 0, shape: StepShape = SHAPE
) -> Iterator[CapturedSample]:
    samples = [tokenized(index, length) for index, length in enumerate(lengths)][first:]
    return captured_samples(lay_into_steps(samples, shape), device)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 128), min_size=1, max_size=60), data=st.data())
def test_every_sample_from_the_first_on_comes_once_in_order_with_its_own_rows(lengths, data):
    first = data.draw(st.integers(0, len(lengths) - 1))
    shape = StepShape(data.draw(st.sampled_from([16, 256])), 128, data.draw(st.integers(1, 3)))
    found = list(run(lengths, FakeDevice(), first, shape))
    assert [sample.sample_idx for sample in found] == list(range(first, len(lengths)))
    for sample in found:
        rows_RD = np.concatenate(sample.taps["residual"].pieces, axis=1)[0]
        assert (rows_RD == sample.tokenized.token_ids[:, None]).all() and rows_RD.shape[1] == 2


def test_a_step_of_which_little_is_wanted_is_not_kept_alive():
    """A view would hold all of it."""
    kept = replace(tokenized(0, 100), positions=np.arange(40, dtype=np.int32))  # of 64
    (whole,) = captured_samples(lay_into_steps([tokenized(0, 256)], StepShape(256, 256)), FakeDevice())
    (few,) = captured_samples(lay_into_steps([kept], StepShape(1024, 128)), FakeDevice())
    assert whole.taps["residual"].pieces[0].base is not None
    assert few.taps["residual"].pieces[0].base is None


def test_the_device_runs_ahead_of_the_host_by_a_bounded_number_of_steps():
    device = FakeDevice()
    taken = 0
    for taken, _ in enumerate(run([128] * 40, device), 1):
        step = -(-taken // 2)  # two such samples fill a step
        assert device.started == min(20, step + STEPS_IN_FLIGHT)
    assert taken == 40


@pytest.mark.parametrize("depth", [1, 3])
def test_reading_runs_ahead_by_a_bounded_number_of_steps(depth):
    made: list[int] = []
    waiting = threading.Semaphore(0)

    def numbers() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            waiting.release()
            yield number

    ahead = prefetch(numbers(), depth)
    for taken in range(20):
        assert next(ahead) == taken
        assert len(made) <= taken + depth + 2  # given out, in the queue, and one that waits to enter it
        while len(made) < min(20, taken + depth + 2):
            assert waiting.acquire(timeout=WAIT_S), "nothing is read while the last item is in use"


def test_an_error_of_the_reader_is_raised_where_the_items_are_used():
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("line 2")

    ahead = prefetch(broken(), 1)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="line 2"):
        next(ahead)


def test_a_reader_that_nobody_listens_to_any_more_ends():
    ahead = prefetch(iter(range(1000)), 1)
    next(ahead)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read"]


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
    monkeypatch.setattr(run_commit, "UPLOADS", 3)
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
    monkeypatch.setattr(run_commit, "UPLOADS", 2)
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


def test_a_failure_is_raised_though_an_older_shard_is_still_on_its_way_and_stops_what_is_tried_again():
    committer, stop = FakeCommitter("upload 1"), threading.Event()
    committer.let_go_of("write", "name", "upload 1")
    with pytest.raises(OSError, match="upload 1"), BackgroundCommitter(committer, stop) as background:
        background.add(0)
        background.add(1)
        until(lambda: background.backlog == 1)
        threading.Thread(target=lambda: stop.wait(WAIT_S) and committer.let_go_of("")).start()
        background.add(2)
    assert stop.is_set() and committer.done[-1] == "commit 0"
    assert not committer.begun["write 2"].is_set()
