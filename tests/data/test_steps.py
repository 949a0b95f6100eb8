"""Samples lie in rows whole and in order; steps cut the rows and nothing else; the first kept rows of a sample are
summed up in the same blocks wherever it stands."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import steps
from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.data.steps import StepShape, lay_into_steps, step_tokens
from qwen_jax.roles import ANSWER


def sample(
    index: int, length: int, kept: list[int] | None = None, answer_from: int | None = None
) -> TokenizedSample:
    ids = np.arange(length, dtype=np.int32) + 1000 * (index + 1)
    roles = np.zeros(length, np.int32)
    if answer_from is not None:
        roles[answer_from:] = ANSWER
    positions = None if kept is None else np.array(kept, np.int32)
    return TokenizedSample(
        index, ids, roles, None, "", "", False, 0, length, positions, with_answer=answer_from is not None
    )


@st.composite
def laid(draw):
    page = draw(st.sampled_from([1, 1, 4]))
    shape = StepShape.of(draw(st.integers(1, 40)), draw(st.integers(1, 60)), draw(st.integers(1, 3)), page)
    lengths = draw(st.lists(st.integers(1, shape.positions), min_size=1, max_size=25))
    return shape, [sample(index, length) for index, length in enumerate(lengths)]


@settings(deadline=None)
@given(laid())
def test_every_token_stands_once_in_order_at_its_position(given):
    shape, samples = given
    found: dict[int, list[int]] = {}
    at: dict[int, tuple[int, int]] = {}
    for number, step in enumerate(lay_into_steps(samples, shape)):
        assert step.tokens_XT.shape == step.positions_XT.shape == (shape.rows, shape.tokens)
        for part in step.parts:
            here = slice(part.offset, part.offset + part.stop - part.start)
            ids = step.tokens_XT[part.row, here]
            np.testing.assert_array_equal(ids, part.sample.token_ids[part.start : part.stop])
            np.testing.assert_array_equal(step.positions_XT[part.row, here], np.arange(part.start, part.stop))
            offset = number * shape.tokens + part.offset
            if part.start == 0:
                assert offset % shape.page == 0
            else:
                assert at[part.sample.sample_idx] == (part.row, offset), "a sample is contiguous in its row"
            at[part.sample.sample_idx] = (part.row, offset + part.stop - part.start)
            found.setdefault(part.sample.sample_idx, []).extend(ids.tolist())
        assert step.positions_XT.max() < shape.positions and step.positions_XT.min() >= 0
    assert found == {each.sample_idx: each.token_ids.tolist() for each in samples}


@settings(deadline=None)
@given(laid())
def test_only_the_end_of_a_run_has_positions_without_a_token(given):
    """But for what stands empty before the next page."""
    shape, samples = given
    left = set(range(len(samples)))

    def reader():
        for each in samples:
            left.discard(each.sample_idx)
            yield each

    for step in lay_into_steps(reader(), shape):
        if left:
            for row in range(shape.rows):
                parts = step.parts_of(row)
                gaps = [
                    after.offset - part.offset - part.stop + part.start
                    for part, after in itertools.pairwise(parts)
                ]
                last = shape.tokens - parts[-1].offset - parts[-1].stop + parts[-1].start
                assert parts[0].offset == 0 and all(gap < shape.page for gap in [*gaps, last])


def test_the_next_sample_goes_to_the_row_with_the_fewest_tokens():
    samples = [sample(index, length) for index, length in enumerate([50, 10, 10, 10, 30])]
    rows = {
        part.sample.sample_idx: part.row
        for step in lay_into_steps(samples, StepShape(100, 60, 2))
        for part in step.parts
    }
    assert rows == {0: 0, 1: 1, 2: 1, 3: 1, 4: 1}


def test_steps_come_as_soon_as_they_are_full_and_no_sample_is_read_ahead():
    read = []

    def reader():
        for index in range(20):
            read.append(index)
            yield sample(index, 10)

    for number, step in enumerate(lay_into_steps(reader(), StepShape(30, 10)), 1):
        assert len(read) == min(20, 3 * number)
        assert list(step.joined) == read[3 * (number - 1) :]


@settings(deadline=None)
@given(data=st.data(), size=st.integers(1, 9))
def test_blocks_are_those_of_the_sample_whatever_the_step(data, size):
    """Together they hold each kept row once, from multiples of the block size on, and are complete when they come."""
    original, steps.BLOCK_TOKENS = steps.BLOCK_TOKENS, size
    try:
        lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))
        kept = [sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1))) for length in lengths]
        samples = [sample(index, *each) for index, each in enumerate(zip(lengths, kept, strict=True))]
        shape = StepShape(data.draw(st.integers(1, 30)), 40)
        sizes: dict[int, list[int]] = {}
        row: list[tuple[int, int]] = []  # what is kept, in the order of the row
        for step in lay_into_steps(samples, shape):
            before = len(row)
            for part in step.parts:
                row += [(part.sample.sample_idx, rank) for rank in part.kept]
            for part in step.parts:
                for offset, count in part.blocks():
                    assert offset >= -size
                    held = row[before + offset : before + offset + count]
                    done = sum(sizes.setdefault(part.sample.sample_idx, []))
                    assert held == [(part.sample.sample_idx, done + offset) for offset in range(count)]
                    sizes[part.sample.sample_idx].append(count)
            starts, counts = step.blocks()
            assert counts.sum() == sum(count for part in step.parts for _, count in part.blocks())
            assert starts.shape[1:] == (1, shape.blocks)
        for each in samples:
            full, rest = divmod(each.n_kept, size)
            assert sizes[each.sample_idx] == [size] * full + [rest] * (rest > 0)
    finally:
        steps.BLOCK_TOKENS = original


@pytest.mark.parametrize("tokens", [3, 7, 50])
def test_kept_tokens_are_named_by_their_place_in_the_step(tokens):
    samples = [sample(0, 20, [3, 19]), sample(1, 5, [0]), sample(2, 9, list(range(9)))]
    found = []
    for step in lay_into_steps(samples, StepShape(tokens, 20)):
        assert step.kept_XR.shape[1] in step.shape.kept_sizes
        assert step.kept_XR.shape[1] >= step.kept_counts[0]
        found += step.tokens_XT[0, step.kept_XR[0, : step.kept_counts[0]]].tolist()
    assert found == [1003, 1019, 2000, *range(3000, 3009)]


@pytest.mark.parametrize("tokens", [3, 7, 50])
def test_each_answer_token_is_foretold_by_the_token_before_it(tokens):
    """Also where a step ends between the two; a prompt that is an answer from its first token has none before."""
    samples = [sample(0, 20, answer_from=14), sample(1, 4, answer_from=0), sample(2, 8)]
    found = []
    for step in lay_into_steps(samples, StepShape(tokens, 20)):
        places, following, counts = (array[0] for array in step.answers())
        found += zip(step.tokens_XT[0, places[:counts]].tolist(), following[:counts].tolist(), strict=True)
    assert found == [(1000 + i - 1, 1000 + i) for i in range(14, 20)] + [
        (2000 + i - 1, 2000 + i) for i in range(1, 4)
    ]


def test_batch_size_is_in_units_of_tokens():
    assert [step_tokens(4, 2048, False), step_tokens(4, 32768, False), step_tokens(2, 100, False)] == [
        8192,
        8192,
        200,
    ]
    assert [step_tokens(4, 2048, True), step_tokens(1, 32768, True), step_tokens(4, 100, True)] == [
        1024,
        256,
        400,
    ]
