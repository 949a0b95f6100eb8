"""Batches hold every sample once, in few shapes, and a resumed run makes the same ones again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data.arc import parse_record, parse_row_line, task_from_row
from qwen_jax.data.batching import WINDOW_LINES, BatchShapes, plan_batches, window_start, windows
from qwen_jax.data.prompts import PromptEncoder, TokenizedSample, load_tokenizer
from qwen_jax.data.sources import iter_source_rows
from tests.data.conftest import REAL


def sample(index: int, length: int) -> TokenizedSample:
    return TokenizedSample(
        index,
        np.full(length, index + 1, np.int32),
        np.zeros(length, np.int32),
        None,
        "",
        "",
        False,
        0,
        length,
    )


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
    assert made[-1] == longest and list(made) == sorted(set(made)) and len(made) <= 16


def test_shorter_batches_take_more_rows():
    shape = BatchShapes(2048, 4, 1)
    assert shape.row_counts(2048) == (1, 2, 4)
    assert shape.row_counts(512) == (1, 2, 16)
    assert BatchShapes(2048, 4, 4).row_counts(1024) == (4, 8, 32)
    assert BatchShapes(2048, 1, 1).row_counts(2048) == (1,)


def test_equal_lengths_fill_whole_steps():
    shape = BatchShapes(512, 4, 1)
    batches = plan_batches([sample(i, 512) for i in range(8)], shape)
    assert [batch.token_ids.shape for batch in batches] == [(4, 512), (4, 512)]


def test_a_straggler_is_computed_alone():
    shape = BatchShapes(512, 4, 1)
    batches = plan_batches([sample(0, 10), *(sample(i, 500) for i in range(1, 5))], shape)
    assert sorted(batch.token_ids.shape for batch in batches) == [(1, 64), (4, 512)]


@pytest.mark.parametrize("name", ["arc_training_200.jsonl", "barc_rows_200.jsonl"])
def test_real_tasks_leave_little_padding(name):
    """At the defaults (2048 tokens, 4 rows, look-ahead 4), at least 93 % of the computed positions are real.

    On more devices a batch has at least a row for each, so that less can be chosen.
    """
    if not REAL.is_dir():
        pytest.skip("the Qwen2.5 tokenizer and the tasks are not beside this checkout")
    encoder = PromptEncoder(load_tokenizer(str(REAL)))
    source = enumerate(iter_source_rows(str(REAL.parent / "data" / name)))
    encoded = [
        encoder.encode(i, parse_record(task_from_row(parse_row_line(row), "examples", "x")))
        for i, (_, row) in source
    ]
    ready = [each for each in encoded if isinstance(each, TokenizedSample)]
    real = sum(len(each.token_ids) for each in ready)
    print(f"{name}: {real / (len(ready) * 2048):.3f} real if padded to 2048")
    for devices, least in ((1, 0.93), (4, 0.9), (8, 0.9)):
        device_shapes = BatchShapes(2048, 4, devices)
        batches = [
            batch
            for window in windows(ready, 4 * device_shapes.tokens_per_step)
            for batch in plan_batches(window, device_shapes)
        ]
        share = real / sum(batch.token_ids.size for batch in batches)
        shapes_used = len({batch.token_ids.shape for batch in batches})
        print(f"{devices} devices: {share:.3f} real, {len(batches)} batches, {shapes_used} shapes")
        assert share >= least
