import json

import pytest

from qwen_jax.errors import ConfigError
from qwen_jax.model.config import parse_config, read_config
from qwen_jax.model.rope import LinearRope, Rope, YarnRope

BASE = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


@pytest.mark.parametrize(
    "rope, theta",
    [
        ({"rope_theta": 1e6}, 1e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({}, 1e4),
    ],
)
def test_both_forms_of_the_rope_field(rope, theta):
    assert parse_config(BASE | rope).rope == Rope(theta)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"model_type": "qwen2_moe"}, "qwen2_moe"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
        ({"model_type": None}, "model_type"),
        ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2}, "sliding window"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "sliding_attention"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
        ({"model_type": "mistral"}, "sliding_window 4096"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}}, "linear needs factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "bend": 2}}, "bend"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "four"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4, "quant_method": "awq"}}, "quantised weights .awq"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "24"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"rope_theta": -1}, "rope_theta"),
    ],
)
def test_refused_by_name(change, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(BASE | change)


@pytest.mark.parametrize(
    "inactive",
    [
        {"use_sliding_window": False, "sliding_window": 512, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 4},
        {"layer_types": ["full_attention"] * 4},
    ],
)
def test_inactive_sliding_windows_are_fine(inactive):
    assert parse_config(BASE | inactive).num_layers == 4


def test_a_scaled_rope_and_how_far_it_reaches():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse_config(BASE | {"rope_theta": 1e6, "rope_scaling": yarn})
    assert config.rope == YarnRope(1e6, factor=4, original_max_position_embeddings=32768)
    assert config.max_positions == 131072
    linear = parse_config(BASE | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope == LinearRope(factor=2) and linear.max_positions == 32768


def test_what_a_family_leaves_out_is_what_its_models_have():
    assert parse_config(BASE | {"model_type": "qwen3"}).head_dim == 128
    heads = {"num_key_value_heads": None, "model_type": "llama"}
    assert parse_config(BASE | heads).num_kv_heads == 4
    mistral = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    mistral |= {"model_type": "mistral", "sliding_window": None, "num_attention_heads": 16}
    assert parse_config(mistral).num_kv_heads == 8


def test_head_dim_may_differ_from_hidden_over_heads():
    assert parse_config(BASE).head_dim == 16
    assert parse_config(BASE | {"head_dim": 32}).head_dim == 32


def test_unreadable_files_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="object"):
        read_config(tmp_path)
