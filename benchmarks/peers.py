"""How the same job is done with Hugging Face or TransformerLens (benchmarks/end_to_end.py runs this).

    python benchmarks/peers.py {hugging_face,transformer_lens} STREAM MODEL OUTPUT SHARD_SIZE_GB

The prompts are those of our own encoder, so that all do the same work.
"""

import gzip
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT  # noqa: F401  (puts the checkout on the path)

from qwen_jax.data.arc import Task
from qwen_jax.data.layouts import PROMPT_FORMATS, Prompt, task_segments
from qwen_jax.data.prompts import PromptEncoder, TokenizedSample, load_tokenizer
from qwen_jax.data.streams import read_stream

BATCH_ROWS = 4

Forward = Callable[[torch.Tensor], list[torch.Tensor]]


def tokenized(stream: str, model: str) -> list[TokenizedSample]:
    encoder = PromptEncoder(load_tokenizer(model))
    return [each for each in encoder.encode_many(read_stream(stream)) if isinstance(each, TokenizedSample)]


def dropped_one_by_one(tokenizer: Any, task: Task, max_seq_length: int) -> np.ndarray | None:
    """Token ids of a task's prompt, tokenised again for each example left out; None if it never fits.

    benchmarks/prompts.py compares this with our encoder.
    """
    for dropped in range(len(task.train) + 1):
        prompt = Prompt(task_segments(task, PROMPT_FORMATS["rows"], dropped))
        encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(encoded["input_ids"], np.int32)
        spans = np.asarray(encoded["offset_mapping"], np.int32)
        prompt.token_roles(spans)
        prompt.token_cells(spans)
        if len(ids) <= max_seq_length:
            return ids
    return None


def hugging_face(model: str) -> Forward:
    """Residual streams after each block but the last, and the normed last one, as the library gives them."""
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    return lambda tokens: list(loaded(tokens, output_hidden_states=True).hidden_states[1:])


def transformer_lens(model: str) -> Forward:
    """run_with_cache of a HookedTransformer over the same weights, unprocessed."""
    from transformer_lens import HookedTransformer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = HookedTransformer.from_pretrained_no_processing(
        "Qwen/Qwen2.5-0.5B",
        hf_model=hf_model,
        tokenizer=AutoTokenizer.from_pretrained(model),
        dtype=torch.float32,
    )
    names = [f"blocks.{i}.hook_resid_post" for i in range(loaded.cfg.n_layers)]

    def forward(tokens: torch.Tensor) -> list[torch.Tensor]:
        _, cache = loaded.run_with_cache(tokens, names_filter=names, return_type=None)
        return [cache[name] for name in names]

    return forward


def batches(samples: list[TokenizedSample]) -> Iterator[list[TokenizedSample]]:
    """Sorted by length, a fixed number of rows each."""
    by_length = sorted(samples, key=lambda sample: len(sample.token_ids))
    for start in range(0, len(by_length), BATCH_ROWS):
        yield by_length[start : start + BATCH_ROWS]


def main(peer: str, stream: str, model: str, output: str, shard_size_gb: str) -> None:
    forward = {"hugging_face": hugging_face, "transformer_lens": transformer_lens}[peer](model)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[int, list[dict]] = {}
    raw_bytes = shards = 0

    def save() -> None:
        nonlocal raw_bytes, shards, data
        shards += 1
        with gzip.open(folder / f"shard_{shards:04d}.pkl.gz", "wb") as file:
            pickle.dump(data, file)
        data, raw_bytes = {}, 0

    for batch in batches(tokenized(stream, model)):
        tokens = np.zeros((len(batch), max(len(sample.token_ids) for sample in batch)), np.int64)
        for row, sample in zip(tokens, batch, strict=True):
            row[: len(sample.token_ids)] = sample.token_ids
        with torch.no_grad():
            hidden = forward(torch.from_numpy(tokens))
        for layer, values in enumerate(hidden):
            for row, sample in enumerate(batch):
                kept = values[row, : len(sample.token_ids)].numpy().copy()
                data.setdefault(layer, []).append({"sample_idx": sample.sample_idx, "activation": kept})
                raw_bytes += kept.nbytes
        if raw_bytes >= float(shard_size_gb) * 2**30:
            save()
    if data:
        save()


if __name__ == "__main__":
    main(*sys.argv[1:])
