"""--keep_tokens keeps what its words say, the same at every start."""

import numpy as np
import pytest

from qwen_jax.data.prompts import SkippedSample, TokenizedSample
from qwen_jax.data.selection import TokenSelection
from qwen_jax.errors import UsageError
from qwen_jax.roles import ANSWER, INSTRUCTION, TEST_INPUT


def sample(length: int = 10, index: int = 3) -> TokenizedSample:
    roles = np.full(length, INSTRUCTION, np.int32)
    roles[4:6], roles[8:] = TEST_INPUT, ANSWER
    return TokenizedSample(index, np.arange(length, dtype=np.int32), roles, None, "", "t", False, 0, length)


@pytest.mark.parametrize(
    "keep, kept",
    [
        ("last", [9]),
        ("last:3", [7, 8, 9]),
        ("last:30", [2, 3, 6, 7, 8, 9]),
        ("every:2", [2, 6, 8]),
        ("every:1", [2, 3, 6, 7, 8, 9]),
        ("all", [2, 3, 6, 7, 8, 9]),
        ("random:1", [2, 3, 6, 7, 8, 9]),
        ("role:answer", [8, 9]),
        ("role:instruction,answer", [2, 3, 6, 7, 8, 9]),
    ],
)
def test_what_is_kept(keep, kept):
    """Without the first two tokens and the special ones 4 and 5."""
    selection = TokenSelection(keep, skip_first=2, special_ids=[4, 5])
    assert selection.apply(sample()).positions.tolist() == kept


def test_all_is_all():
    assert TokenSelection().apply(sample()).positions is None


def test_a_sample_with_nothing_to_keep_is_skipped():
    for selection in (TokenSelection("role:system"), TokenSelection(skip_first=10)):
        skipped = selection.apply(sample())
        assert isinstance(skipped, SkippedSample) and "no token is kept" in skipped.reason


def test_random_depends_on_stream_and_sample_alone():
    def drawn(stream: str, index: int) -> list[int]:
        selection = TokenSelection("random:0.25", stream_sha256=stream)
        return selection.apply(sample(4000, index)).positions.tolist()

    assert drawn("ab" * 32, 3) == drawn("ab" * 32, 3)
    assert drawn("ab" * 32, 3) != drawn("ab" * 32, 4)
    assert drawn("ab" * 32, 3) != drawn("cd" * 32, 3)
    assert 900 < len(drawn("ab" * 32, 3)) < 1100


OTHER = (
    "|some|all:1|last:0|last:-1|last:x|last:|every|every:0|random|random:0|random:2|random:nan|role|eval()"
)


@pytest.mark.parametrize("keep", OTHER.split("|"))
def test_other_words_are_refused(keep):
    with pytest.raises(UsageError, match="--keep_tokens"):
        TokenSelection(keep)


def test_other_roles_are_refused():
    for keep in ("role:", "role:nobody", "role:answer,"):
        with pytest.raises(UsageError, match="no role is called"):
            TokenSelection(keep)
