"""A LoRA adapter is W + s B A, in float32, whatever W is stored in; what else PEFT can save is refused by name."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from qwen_jax.errors import ConfigError, StorageError
from qwen_jax.model.adapter import open_adapter
from qwen_jax.model.sharding import make_mesh
from qwen_jax.model.source import fetch_adapter
from qwen_jax.model.weights import load_model, open_checkpoint
from qwen_jax.run.hugging_face import hugging_face_reference
from tests.few import few
from tests.hf_reference import load_reference, reference_taps, save_reference
from tests.model.conftest import run, samples_of
from tests.model.test_parity import STACK_TOLERANCE, worst_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none", "modules_to_save": None}


def adapter_tensors(hf, rank: int = 4) -> dict[str, np.ndarray]:
    rng, tensors = np.random.default_rng(5), {}
    for layer in range(len(hf.model.layers)):
        for matrix in MATRICES:
            name = f"model.layers.{layer}.{matrix}"
            rows, columns = hf.get_parameter(f"{name}.weight").shape
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = rng.normal(0, 0.1, shape).astype(np.float32)
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = values
    return tensors


def save_adapter(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("config, scale", few([({"use_rslora": True}, 12 / 4**0.5), ({}, 12 / 4)]))
def test_the_adapted_model_is_hugging_faces(small, tmp_path, config, scale):
    """On a bfloat16 checkpoint, whose matrices are not rounded again when the change is added."""
    base = save_reference(load_reference(small.folder), tmp_path / "base", "bfloat16")
    hf = load_reference(base)
    tensors = adapter_tensors(hf)
    adapter = save_adapter(tmp_path / "adapter", tensors, **config)
    tokens = small.tokens(1, 40)
    plain = reference_taps(hf, tokens)["residual"]
    for name in [name for name in tensors if "lora_A" in name]:
        a, b = (torch.from_numpy(tensors[each]) for each in (name, name.replace("lora_A", "lora_B")))
        matrix = name.removeprefix("base_model.model.").replace(".lora_A", "")
        hf.get_parameter(matrix).data += scale * (b @ a)
    expected = reference_taps(hf, tokens)["residual"]
    checkpoint = open_checkpoint(base, adapter)
    model = load_model(checkpoint, small.config, small.config.num_layers, jnp.float32, make_mesh())
    assert worst_error(run(model, tokens, range(small.config.num_layers)), expected) < STACK_TOLERANCE
    assert worst_error(plain, expected) > 0.01
    (sample,) = samples_of(tokens)
    certified = hugging_face_reference(base, checkpoint.adapter)(sample)
    assert worst_error(certified["residual"], expected[:, 0]) < STACK_TOLERANCE
    assert checkpoint.digest() != open_checkpoint(base).digest()


@pytest.mark.parametrize(
    "config, words",
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"lora_alpha": "much"}, "much"),
    ],
)
def test_what_is_no_low_rank_product_is_refused_by_name(small, tmp_path, config, words):
    folder = save_adapter(tmp_path, adapter_tensors(small.hf), **config)
    with pytest.raises(ConfigError, match=words):
        open_adapter(folder)


def test_tensors_that_do_not_fit_are_all_named(small, tmp_path):
    tensors = adapter_tensors(small.hf)
    prefix = "base_model.model.model.layers.0.self_attn"
    del tensors[f"{prefix}.q_proj.lora_B.weight"]
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((4, 9), np.float32)
    with pytest.raises(ConfigError) as caught:
        open_adapter(save_adapter(tmp_path / "odd", tensors))
    for words in ("lora_embedding_A", "half of model.layers.0.self_attn.q_proj.weight"):
        assert words in str(caught.value)
    tensors = adapter_tensors(small.hf)
    tensors[f"{prefix}.k_proj.lora_B.weight"] = np.zeros((3, 4), np.float32)
    for side, shape in (("A", (4, 9)), ("B", (9, 4))):
        tensors[f"base_model.model.model.layers.0.router.lora_{side}.weight"] = np.zeros(shape, np.float32)
    checkpoint = open_checkpoint(small.folder, save_adapter(tmp_path / "unfit", tensors))
    with pytest.raises(ConfigError) as caught:
        load_model(checkpoint, small.config, 1, jnp.float32, make_mesh())
    for words in (
        "k_proj.weight is [3, 112], the model has [16, 112]",
        "router.weight is [9, 9], the model has no",
    ):
        assert words in str(caught.value)


def test_an_adapter_comes_from_a_folder_or_the_hub(tmp_path):
    assert fetch_adapter(str(tmp_path)).folder == tmp_path
    with pytest.raises(ConfigError, match="adapter_path .*no such folder"):
        fetch_adapter(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="adapter_config.json"):
        open_adapter(tmp_path)
    with pytest.raises(StorageError, match="--adapter_path someone/adapter"):
        fetch_adapter("someone/adapter@main")
