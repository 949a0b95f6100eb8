"""Hugging Face's model as a reference, for users who have torch; nothing else in the package imports it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.data.prompts import TokenizedSample


def hugging_face_reference(folder: Path) -> Callable[[TokenizedSample], dict[str, np.ndarray]]:
    """A function from a prompt to `{tap: [layers, tokens, hidden]}`, float32, by hooks on every block.

    Hooks, because the last entry of Hugging Face's own hidden_states is already normed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    caught: dict[str, list[np.ndarray]] = {}

    def catch(tap: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            caught.setdefault(tap, []).append(first[0].detach().numpy().copy())

        return hook

    model.model.embed_tokens.register_forward_hook(catch("embedding"))
    for block in model.model.layers:
        block.self_attn.register_forward_hook(catch("attn"))
        block.mlp.register_forward_hook(catch("mlp"))
        block.register_forward_hook(catch("residual"))

    def run(prompt: TokenizedSample) -> dict[str, np.ndarray]:
        caught.clear()
        with torch.no_grad():
            model.model(torch.from_numpy(prompt.token_ids.astype(np.int64))[None])
        return {tap: np.stack(arrays) for tap, arrays in caught.items()}

    return run
