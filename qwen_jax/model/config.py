"""A model's architecture as `config.json` states it; what we cannot do is refused by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_jax.errors import ConfigError
from qwen_jax.model.families import FAMILIES, Family
from qwen_jax.model.rope import Rope, parse_rope

_DEFAULT_RMS_NORM_EPS = 1e-6  # of transformers, for every family


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a dense model, and what its family has besides (families.py). All lengths are counts, not bytes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    rms_norm_eps: float
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by the dimension letters of qwen_jax/model/decoder.py."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "F": self.intermediate_size,
            "L": self.num_layers,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
        }


def read_config(folder: str | Path) -> ModelConfig:
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


def parse_config(fields: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Turns the fields of a `config.json` into a ModelConfig.

    Raises ConfigError for an architecture that is in no family (mixtures of experts and models that see among them), a
    sliding window in use, an unknown rope type, quantised weights, an activation other than silu, or a missing size.
    """
    family = _family(fields, source)
    fields = {**family.absent, **fields}
    sizes = {key: _size(fields, key, source) for key in _SIZE_FIELDS}
    _refuse_sliding_windows(family, fields, source)
    num_heads = sizes["num_attention_heads"]
    num_kv_heads = _size(fields, "num_key_value_heads", source, default=num_heads)
    head_dim = _size(fields, "head_dim", source, default=sizes["hidden_size"] // num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise ConfigError(
            f"{source}: {num_heads} attention heads, {num_kv_heads} key-value heads and head size "
            f"{head_dim} do not fit together"
        )
    rope = parse_rope(fields, source)
    return ModelConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        rms_norm_eps=float(fields.get("rms_norm_eps", _DEFAULT_RMS_NORM_EPS)),
        max_positions=rope.positions(_size(fields, "max_position_embeddings", source)),
        tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias(fields),
        o_bias=family.o_bias(fields),
        mlp_bias=family.mlp_bias(fields),
        qk_norm=family.qk_norm(fields),
    )


_SIZE_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _size(fields: Mapping[str, Any], key: str, source: str, default: int | None = None) -> int:
    value = fields.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{source}: {key} must be a whole number above 0, got {value!r}")
    return value


def _family(fields: Mapping[str, Any], source: str) -> Family:
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(f"{family.title} ({name!r})" for name, family in FAMILIES.items())
        raise ConfigError(
            f"{source}: model_type {model_type!r} is not supported; dense models of these families are: {known}"
        )
    if quantised := fields.get("quantization_config"):
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, Mapping) else quantised
        raise ConfigError(
            f"{source}: quantised weights ({method}, quantization_config) are not supported; use the unquantised model"
        )
    if fields.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"{source}: hidden_act {fields['hidden_act']!r} is not supported; these families use 'silu'"
        )
    return FAMILIES[model_type]


def _refuse_sliding_windows(family: Family, fields: Mapping[str, Any], source: str) -> None:
    layer_types = fields.get("layer_types")
    in_use = family.windows(fields) if layer_types is None else sorted(set(layer_types) - {"full_attention"})
    if in_use:
        raise ConfigError(
            f"{source}: sliding window attention is active ({', '.join(in_use)}) and not supported; "
            "hidden states computed without it would be wrong"
        )
