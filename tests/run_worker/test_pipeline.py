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
from qwen_jax.run.pipeline import STEPS_IN_FLIGHT, CapturedSample, captured_samples

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
