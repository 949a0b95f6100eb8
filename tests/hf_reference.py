"""Random checkpoints made with transformers and torch, and their hidden states: the truth in tests.

As a script it writes a checkpoint of a published size, for trying things at the true shape:
    python tests/hf_reference.py OUT_FOLDER --size 0.5B --dtype bfloat16

torch and transformers take seconds to import, which a process that makes no model is spared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # where this is a script
from qwen_jax.model.published import PUBLISHED


def make_reference(
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool,
    seed: int = 0,
    model_type: str = "qwen2",
    **fields: Any,
) -> PreTrainedModel:
    """A model whose every tensor is random, with three channels 100 times larger than the rest.

    Zero biases or unit norms would hide a dropped bias or norm. The outliers stand in the embedding, so
    that the mean squares of the norms are dominated by them, as in the trained models; the norm weights
    of those channels are small, as there too, or attention would saturate and the comparison would only
    measure chaos.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    windows = {"max_window_layers": layers} if model_type == "qwen2" else {}
    config = AutoConfig.for_model(
        model_type,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        **plain | windows | fields,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is not a weight
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    outliers = torch.randperm(hidden, generator=generator)[:3]
    for name, parameter in model.named_parameters():
        _randomise(name, parameter.data, outliers, generator)
    return model


def _randomise(name: str, data: torch.Tensor, outliers: torch.Tensor, generator: torch.Generator) -> None:
    if "norm" in name:
        data.uniform_(0.5, 1.5, generator=generator)
        if "self_attn" not in name:
            data[outliers] *= 0.05
    elif "bias" in name:
        data.normal_(0, 0.3, generator=generator)
    elif "embed" in name:
        data.normal_(0, 0.05, generator=generator)
        data[:, outliers] *= 100
    else:
        data.normal_(0, 0.7 / data.shape[1] ** 0.5, generator=generator)


def save_reference(model: PreTrainedModel, folder: str | Path, dtype: str = "float32", **kwargs) -> Path:
    """Writes the model as a checkpoint folder; its weights are rounded to `dtype` first."""
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(folder, **kwargs)
    return Path(folder)


def load_reference(folder: str | Path, dtype: str = "float32") -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def reference_taps(model: PreTrainedModel, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every tap of every block, through hooks: tap -> float32 [L, B, T, width].

    Hooks, because the last entry of Hugging Face's own hidden_states is already normed.
    """
    import torch

    caught: dict[str, list[np.ndarray]] = {}

    def keep(tap: str, seen) -> None:
        first = seen[0] if isinstance(seen, tuple) else seen
        caught.setdefault(tap, []).append(first.detach().float().numpy().copy())

    def given(tap: str):
        return lambda module, args, output: keep(tap, output)

    def taken(tap: str):
        return lambda module, args: keep(tap, args)

    handles = []
    for block in model.model.layers:
        handles += [
            block.input_layernorm.register_forward_hook(given("attn_in")),
            block.self_attn.o_proj.register_forward_pre_hook(taken("attn_heads")),
            block.self_attn.register_forward_hook(given("attn")),
            block.post_attention_layernorm.register_forward_pre_hook(taken("resid_mid")),
            block.post_attention_layernorm.register_forward_hook(given("mlp_in")),
            block.mlp.down_proj.register_forward_pre_hook(taken("mlp_act")),
            block.mlp.register_forward_hook(given("mlp")),
            block.register_forward_hook(given("residual")),
        ]
    with torch.no_grad():
        model.model(torch.from_numpy(np.asarray(tokens, np.int64)))
    for handle in handles:
        handle.remove()
    return {tap: np.stack(arrays) for tap, arrays in caught.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--size", choices=PUBLISHED, default="0.5B")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    print(save_reference(make_reference(*PUBLISHED[args.size]), args.folder, args.dtype))


if __name__ == "__main__":
    main()
