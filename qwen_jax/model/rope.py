"""Rotary positions (Su et al. 2021): the kinds of frequencies that a config.json may ask for.

A kind's fields are those of `rope_parameters` (transformers 5) or `rope_scaling` (before it), by their names there.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np

from qwen_jax.errors import ConfigError

_DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Rope:
    """Plain frequencies theta**(-2i/H), float32. scale: what cos and sin are multiplied by."""

    rope_theta: float = _DEFAULT_THETA

    @property
    def scale(self) -> float:
        return 1.0

    def positions(self, stated: int) -> int:
        """How many the model knows, of which its config states `stated`."""
        return stated

    def frequencies(self, head_dim: int) -> np.ndarray:
        """float32 [H/2], radians a position."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return np.float32(1.0) / np.power(np.float32(self.rope_theta), exponents)


@dataclass(frozen=True, kw_only=True)
class LinearRope(Rope):
    """All frequencies divided by a factor (Chen et al. 2023)."""

    factor: float

    def frequencies(self, head_dim: int) -> np.ndarray:
        return super().frequencies(head_dim) / np.float32(self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(LinearRope):
    """Only slow ones divided, and those between slow and fast in part (Llama 3.1's model card)."""

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    def frequencies(self, head_dim: int) -> np.ndarray:
        plain, slowed = Rope.frequencies(self, head_dim), super().frequencies(head_dim)
        turns = np.float32(self.original_max_position_embeddings) * plain / np.float32(2 * math.pi)
        low, high = np.float32(self.low_freq_factor), np.float32(self.high_freq_factor)
        share = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - share) * slowed + share * plain


@dataclass(frozen=True, kw_only=True)
class YarnRope(LinearRope):
    """Divided by dimension, along a ramp from fast to slow ones (Peng et al. 2023)."""

    original_max_position_embeddings: float
    beta_fast: float = 32
    beta_slow: float = 1
    attention_factor: float = 0
    mscale: float = 0
    mscale_all_dim: float = 0
    truncate: bool = True

    @property
    def scale(self) -> float:
        if self.attention_factor:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1)

    def _grown(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def positions(self, stated: int) -> int:
        return max(stated, round(self.factor * self.original_max_position_embeddings))

    def frequencies(self, head_dim: int) -> np.ndarray:
        plain, slowed = Rope.frequencies(self, head_dim), super().frequencies(head_dim)
        first, last = self._dimension(self.beta_fast, head_dim), self._dimension(self.beta_slow, head_dim)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        if first == last:
            last += 0.001
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - first) / (last - first), 0, 1)
        return (slowed * ramp + plain * (1 - ramp)).astype(np.float32)

    def _dimension(self, turns: float, head_dim: int) -> float:
        """Where in the head a frequency turns so often over the original positions."""
        ratio = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(self.rope_theta))


ROPE_KINDS: dict[str, type[Rope]] = {
    "default": Rope,
    "linear": LinearRope,
    "llama3": Llama3Rope,
    "yarn": YarnRope,
}
"""By `rope_type`."""
_ELSEWHERE = {"rope_type", "type", "rope_theta"}


def parse_rope(config: Mapping[str, Any], source: str) -> Rope:
    """The rope that the fields of a config.json ask for; raises ConfigError naming what is not supported."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    name = given.get("rope_type", given.get("type", "default"))
    if name not in ROPE_KINDS:
        raise ConfigError(
            f"{source}: rope type {name!r} is not supported, only {', '.join(ROPE_KINDS)}; "
            "remove the rope scaling to run the model within its trained context"
        )
    kind = ROPE_KINDS[name]
    given.setdefault("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
    given.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    if given.pop("partial_rotary_factor") not in (None, 1):
        raise ConfigError(f"{source}: partial_rotary_factor is not supported, all of a head must turn")
    wanted = {field.name: field for field in fields(kind)}
    if "original_max_position_embeddings" in wanted:
        given.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    unknown = [key for key in given if key not in wanted and key not in _ELSEWHERE and given[key] is not None]
    if unknown and name != "default":
        raise ConfigError(f"{source}: {', '.join(unknown)} of rope type {name} is not supported")
    values = {}
    for key, field in wanted.items():
        if given.get(key) is not None:
            values[key] = _value(given[key], key, source)
        elif field.default is MISSING:
            raise ConfigError(f"{source}: rope type {name} needs {key}; copy it from the model's page")
    return kind(**values)


def _value(value: Any, key: str, source: str) -> float | bool:
    if key == "truncate" and isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{source}: {key} must be a number above 0, got {value!r}")
    return float(value)
