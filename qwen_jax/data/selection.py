"""Which of a sample's tokens are kept: the grammar of --keep_tokens."""

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from qwen_jax.data.prompts import SkippedSample, TokenizedSample
from qwen_jax.errors import UsageError
from qwen_jax.kinds import KEEP_ALL
from qwen_jax.roles import RoleSet

# Takes a sample and the positions that are left, ascending; returns those to keep.
_Rule = Callable[[TokenizedSample, np.ndarray], np.ndarray]


class TokenSelection:
    """The tokens to keep of each sample: a function of the stream and the settings alone.

    role_names: the roles that keep_tokens names.
    """

    def __init__(
        self,
        keep_tokens: str = KEEP_ALL,
        *,
        skip_first: int = 0,
        special_ids: Collection[int] = (),
        stream_sha256: str = "0",
    ):
        """keep_tokens: all, last, last:K, every:K, random:P or role:NAME,NAME (roles.RoleSet), applied to what is
        left without the first `skip_first` tokens and without `special_ids`. stream_sha256: hexadecimal; with
        the sample's index it seeds random:P. Raises UsageError for another keep_tokens.
        """
        self.keep_tokens = keep_tokens
        self.role_names: tuple[str, ...] = ()
        self._seed = int(stream_sha256[:16], 16)
        self._skip_first = skip_first
        self._special_ids = list(special_ids)
        self._rule = self._parse(keep_tokens)

    @property
    def keeps_all(self) -> bool:
        return self.keep_tokens == KEEP_ALL and not self._skip_first and not self._special_ids

    def apply(self, sample: TokenizedSample) -> TokenizedSample | SkippedSample:
        """The sample with its kept positions; skipped if none is kept."""
        if self.keeps_all:
            return sample
        positions = np.arange(min(self._skip_first, len(sample.token_ids)), len(sample.token_ids))
        positions = positions[~np.isin(sample.token_ids[positions], self._special_ids)]
        kept = self._rule(sample, positions).astype(np.int32)
        if not len(kept):
            reason = f"no token is kept by keep_tokens {self.keep_tokens}"
            return SkippedSample(sample.sample_idx, sample.task_id, reason, sample.full_length)
        return replace(sample, positions=kept)

    def _parse(self, text: str) -> _Rule:
        if text == KEEP_ALL:
            return lambda sample, positions: positions
        name, colon, value = text.partition(":")
        match name, bool(colon):
            case "last", _:
                count = _whole(text, value) if colon else 1
                return lambda sample, positions: positions[-count:]
            case "every", True:
                step = _whole(text, value)
                return lambda sample, positions: positions[::step]
            case "random", True:
                share = _share(text, value)
                return lambda sample, positions: positions[self._draw(sample, len(positions)) < share]
            case "role", True:
                roles = RoleSet(value.split(","))
                self.role_names = roles.names
                return lambda sample, positions: positions[roles.mask(sample.roles[positions])]
        raise _unreadable(text)

    def _draw(self, sample: TokenizedSample, count: int) -> np.ndarray:
        return np.random.default_rng([self._seed, sample.sample_idx]).random(count)


def _whole(text: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and 0 < int(value) < 1 << 31):
        raise _unreadable(text)
    return int(value)


def _share(text: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise _unreadable(text)
    return share


def _unreadable(text: str) -> UsageError:
    return UsageError(
        f"--keep_tokens {text}: give all, last, last:K, every:K (K a whole number from 1), random:P "
        "(P above 0, at most 1) or role:NAME,NAME"
    )
