"""The Qwen2 / Qwen2.5 architecture as `config.json` states it; what we cannot do is refused by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_jax.errors import ConfigError

# What transformers assumes where a Qwen2 config.json leaves the field out.
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_RMS_NORM_EPS = 1e-6
_DEFAULT_SLIDING_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28


@dataclass(frozen=True)
class Qwen2Config:
    """The sizes of a dense Qwen2 model. All lengths are counts, not bytes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_positions: int
    tied_embeddings: bool

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by the dimension letters of qwen_jax/model/qwen2.py."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "L": self.num_layers,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
        }


def read_config(folder: str | Path) -> Qwen2Config:
    """Reads `config.json` of a local checkpoint folder; raises ConfigError naming what is wrong."""
    path = Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; --model_path must be a Hugging Face id or a folder "
            "with config.json, *.safetensors and tokenizer.json"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); download the model again") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} does not hold a JSON object; download the model again")
    return parse_config(fields, str(path))


def parse_config(fields: Mapping[str, Any], source: str = "config.json") -> Qwen2Config:
    """Turns the fields of a `config.json` into a Qwen2Config.

    Raises ConfigError for any architecture other than dense Qwen2, an active sliding window, a rope
    type other than `default`, quantised weights, an activation other than silu, or a missing size.
    """
    _refuse_other_architectures(fields, source)
    _refuse_sliding_window(fields, source)
    sizes = {key: _size(fields, key, source) for key in _SIZE_FIELDS}
    num_heads = sizes["num_attention_heads"]
    num_kv_heads = _size(fields, "num_key_value_heads", source, default=num_heads)
    head_dim = _size(fields, "head_dim", source, default=sizes["hidden_size"] // num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise ConfigError(
            f"{source}: {num_heads} attention heads, {num_kv_heads} key-value heads and head size "
            f"{head_dim} do not fit together"
        )
    return Qwen2Config(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope_theta=_rope_theta(fields, source),
        rms_norm_eps=float(fields.get("rms_norm_eps", _DEFAULT_RMS_NORM_EPS)),
        max_positions=_size(fields, "max_position_embeddings", source, default=32768),
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )


_SIZE_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _size(fields: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = fields.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{source}: {key} must be a whole number above 0, got {value!r}")
    return value


def _refuse_other_architectures(fields: Mapping[str, Any], source: str) -> None:
    model_type = fields.get("model_type")
    if model_type != "qwen2":
        raise ConfigError(
            f"{source}: model_type {model_type!r} is not supported; only dense Qwen2 and Qwen2.5 models "
            "(model_type 'qwen2') are"
        )
    if fields.get("quantization_config"):
        raise ConfigError(
            f"{source}: quantised weights (quantization_config) are not supported; use the unquantised model"
        )
    if fields.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"{source}: hidden_act {fields['hidden_act']!r} is not supported; Qwen2 uses 'silu'"
        )


def _refuse_sliding_window(fields: Mapping[str, Any], source: str) -> None:
    layer_types = fields.get("layer_types")
    if layer_types is not None:
        active = sorted(set(layer_types) - {"full_attention"})
    else:
        enabled = fields.get("use_sliding_window", False)
        window = fields.get("sliding_window", _DEFAULT_SLIDING_WINDOW)
        first_layer = fields.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
        windowed = enabled and window is not None and first_layer < fields.get("num_hidden_layers", 0)
        active = ["use_sliding_window"] if windowed else []
    if active:
        raise ConfigError(
            f"{source}: sliding window attention is active ({', '.join(active)}) and not supported; "
            "hidden states computed without it would be wrong"
        )


def _rope_theta(fields: Mapping[str, Any], source: str) -> float:
    """The rope base, from `rope_parameters` (transformers 5) or `rope_theta` (before it)."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(
            f"{source}: rope type {rope_type!r} is not supported, only 'default'; "
            "remove the rope scaling to run the model within its trained context"
        )
    theta = scaling.get("rope_theta", fields.get("rope_theta", _DEFAULT_ROPE_THETA))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise ConfigError(f"{source}: rope_theta must be a number above 0, got {theta!r}")
    return float(theta)
