"""What sets one family of models apart from another: the one place that knows their names.

All share one block (decoder.py): an RMS norm before each sublayer, grouped-query attention with rotary positions,
SwiGLU. A family says what it has besides, and what transformers assumes where its config.json leaves a field out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]
Says = Callable[[Fields], bool]
"""Whether a config.json has something."""


def _always(fields: Fields) -> bool:
    return True


def _never(fields: Fields) -> bool:
    return False


def _flag(name: str) -> Says:
    return lambda fields: bool(fields.get(name))


def _no_windows(fields: Fields) -> list[str]:
    return []


def _windows_of_deep_layers(fields: Fields) -> list[str]:
    """`use_sliding_window`: of the layers from `max_window_layers` on."""
    first_layer = fields["max_window_layers"]
    in_use = fields.get("use_sliding_window") and fields["sliding_window"] is not None
    return ["use_sliding_window"] if in_use and first_layer < fields["num_hidden_layers"] else []


def _window_of_all_layers(fields: Fields) -> list[str]:
    window = fields["sliding_window"]
    return [f"sliding_window {window}"] if window is not None else []


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json.

    title: for people. qkv_bias, o_bias, mlp_bias: whether those products have a bias; qk_norm: whether each head's
    query and key are normed. windows: the sliding windows in use, in words. absent: by the field's name, what stands
    for one that is not there.
    """

    title: str
    qkv_bias: Says = _never
    o_bias: Says = _never
    mlp_bias: Says = _never
    qk_norm: Says = _never
    windows: Callable[[Fields], list[str]] = _no_windows
    absent: Fields = field(default_factory=dict)


_QWEN_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}
_ATTENTION_BIAS = _flag("attention_bias")

FAMILIES = {
    "qwen2": Family(
        "Qwen2 and Qwen2.5", qkv_bias=_always, windows=_windows_of_deep_layers, absent=_QWEN_WINDOWS
    ),
    "qwen3": Family(
        "Qwen3",
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        qk_norm=_always,
        windows=_windows_of_deep_layers,
        absent=_QWEN_WINDOWS | {"head_dim": 128},
    ),
    "llama": Family(
        "Llama 2 and 3",
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        mlp_bias=_flag("mlp_bias"),
        absent={"max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "Mistral",
        windows=_window_of_all_layers,
        absent={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
}
"""By `model_type`."""
