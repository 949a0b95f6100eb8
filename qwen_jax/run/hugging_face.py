"""Hugging Face's model as a reference, for users who have torch; nothing else in the package imports it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.kinds import ALL_KINDS, EMBEDDING, KINDS
from qwen_jax.model.adapter import Adapter


def hugging_face_reference(
    folder: Path, adapter: Adapter | None = None
) -> Callable[[TokenizedSample], dict[str, np.ndarray]]:
    """A function from a prompt to `{tap: [layers, tokens, width]}`, float32, by hooks on every block.

    Hooks, because the last entry of Hugging Face's own hidden_states is already normed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    for name, change in ({} if adapter is None else adapter.changes).items():
        model.get_parameter(name).data += torch.from_numpy(change.b) @ torch.from_numpy(change.a)
    caught: dict[str, list[np.ndarray]] = {}

    def catch(tap: str, taken_in: bool) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen = args if taken_in else output
            first = seen[0] if isinstance(seen, tuple) else seen
            caught.setdefault(tap, []).append(first[0].detach().numpy().copy())

        return hook

    places = [(model.model, EMBEDDING, ALL_KINDS[EMBEDDING])]
    places += [(block, tap, kind) for block in model.model.layers for tap, kind in KINDS.items()]
    for part, tap, kind in places:
        part.get_submodule(kind.module).register_forward_hook(catch(tap, kind.taken_in))

    def run(prompt: TokenizedSample) -> dict[str, np.ndarray]:
        caught.clear()
        with torch.no_grad():
            model.model(torch.from_numpy(prompt.token_ids.astype(np.int64))[None])
        return {tap: np.stack(arrays) for tap, arrays in caught.items()}

    return run
