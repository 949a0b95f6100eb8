"""Batches hold every sample once, in few shapes, and a resumed run makes the same ones again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data.batching import WINDOW_LINES, BatchShapes, plan_batches, window_start, windows
from qwen_jax.data.prompts import TokenizedSample


def sample(index: int, length: int) -> TokenizedSample:
    return TokenizedSample(index, np.full(length, index + 1, np.int32), "", "", False, 0, length)


lengths = st.lists(st.integers(1, 512), min_size=1, max_size=150)
shapes = BatchShapes(max_seq_length=512, rows_per_device=4, devices=2)


@settings(deadline=None)
@given(lengths=lengths)
def test_every_sample_stands_in_one_row_padded_on_the_right(lengths):
    planned = [sample(i, n) for i, n in enumerate(lengths)]
    seen = []
    for window in windows(planned, 4 * shapes.tokens_per_step):
        for batch in plan_batches(window, shapes):
            rows, length = batch.token_ids.shape
            assert length in shapes.lengths and rows % shapes.devices == 0
            assert batch.token_ids.size <= shapes.tokens_per_step
            for row, each in zip(batch.token_ids, batch.samples, strict=False):
                n = len(each.token_ids)
                assert (row[:n] == each.token_ids).all() and not row[n:].any()
                seen.append(each.sample_idx)
            assert not batch.token_ids[len(batch.samples) :].any()
    assert sorted(seen) == list(range(len(lengths)))


@settings(deadline=None)
@given(lengths=lengths, data=st.data())
def test_a_run_that_starts_in_the_middle_makes_the_same_batches(lengths, data):
    """From the start of the window that holds sample `first`, all its batches and all later ones recur."""
    everything = [sample(i, n) for i, n in enumerate(lengths)]
    first = data.draw(st.integers(0, len(lengths) - 1))

    def plan(samples):
        return [
            (batch.token_ids.shape, tuple(each.sample_idx for each in batch.samples))
            for window in windows(samples, 2 * shapes.tokens_per_step)
            for batch in plan_batches(window, shapes)
        ]

    start = window_start(first)
    assert start <= first and start % WINDOW_LINES == 0
    resumed = plan(everything[start:])
    assert resumed == [batch for batch in plan(everything) if min(batch[1]) >= start]


@settings(deadline=None)
@given(lengths=lengths)
def test_look_ahead_is_bounded(lengths):
    limit = 2 * shapes.tokens_per_step
    for window in windows([sample(i, n) for i, n in enumerate(lengths)], limit):
        assert sum(len(each.token_ids) for each in window) <= limit
        assert len({each.sample_idx // WINDOW_LINES for each in window}) == 1


@pytest.mark.parametrize("longest", [1, 63, 64, 512, 2048, 2000, 32768])
def test_few_lengths_up_to_the_longest(longest):
    made = BatchShapes(longest, 4).lengths
    assert made[-1] == longest and list(made) == sorted(set(made)) and len(made) <= 32


def test_shorter_batches_take_more_rows():
    shape = BatchShapes(2048, 4, 1)
    assert shape.rows_for(2048, 100) == 4
    assert shape.rows_for(512, 100) == 16
    assert shape.rows_for(512, 3) == 4
    assert shape.rows_for(2048, 1) == 1
