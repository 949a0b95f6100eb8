"""How the same job is done with Hugging Face or TransformerLens (benchmarks/end_to_end.py runs this).

    python benchmarks/peers.py {hugging_face,transformer_lens} STREAM MODEL OUTPUT SHARD_SIZE_GB MAX_SEQ_LENGTH ROWS

ROWS: of a batch. The prompts are those of our own encoder, so that all do the same work.
"""

import gzip
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import tokenized

from qwen_jax.data.arc import Task
from qwen_jax.data.layouts import PROMPT_FORMATS, Prompt
from qwen_jax.data.prompts import TokenizedSample
from qwen_jax.data.streams import read_stream

Forward = Callable[[torch.Tensor], list[torch.Tensor]]


def dropped_one_by_one(tokenizer: Any, task: Task, max_seq_length: int) -> np.ndarray | None:
    """Token ids of a task's prompt, tokenised again for each example left out; None if it never fits.

    benchmarks/prompts.py compares this with our encoder.
    """
    for dropped in range(len(task.train) + 1):
        prompt = Prompt(PROMPT_FORMATS["rows"].segments(task, dropped))
        encoded = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(encoded["input_ids"], np.int32)
        spans = np.asarray(encoded["offset_mapping"], np.int32)
        prompt.token_roles(spans)
        prompt.token_cells(spans)
        if len(ids) <= max_seq_length:
            return ids
    return None


def hugging_face(model: str, dtype: torch.dtype = torch.float32) -> Forward:
    """Residual streams after each block but the last, and the normed last one, as the library gives them."""
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(model, dtype=dtype).eval()
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


def padded(forward: Forward, batch: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """The layers' hidden states, float32 [n_tokens, hidden], of each of a batch's samples, padded on the right."""
    tokens = np.zeros((len(batch), max(map(len, batch))), np.int64)
    for row, token_ids in zip(tokens, batch, strict=True):
        row[: len(token_ids)] = token_ids
    with torch.no_grad():
        hidden = forward(torch.from_numpy(tokens))
    return [
        [values[row, : len(token_ids)].float().numpy().copy() for values in hidden]
        for row, token_ids in enumerate(batch)
    ]


def batches(samples: list[TokenizedSample], rows: int) -> Iterator[list[TokenizedSample]]:
    """Sorted by length, so many rows each."""
    by_length = sorted(samples, key=lambda sample: len(sample.token_ids))
    for start in range(0, len(by_length), rows):
        yield by_length[start : start + rows]


def main(
    peer: str, stream: str, model: str, output: str, shard_size_gb: str, max_seq_length: str, rows: str
) -> None:
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

    for batch in batches(tokenized(read_stream(stream), int(max_seq_length)), int(rows)):
        layers_of = padded(forward, [sample.token_ids for sample in batch])
        for sample, layers in zip(batch, layers_of, strict=True):
            for layer, kept in enumerate(layers):
                data.setdefault(layer, []).append({"sample_idx": sample.sample_idx, "activation": kept})
                raw_bytes += kept.nbytes
        if raw_bytes >= float(shard_size_gb) * 2**30:
            save()
    if data:
        save()


if __name__ == "__main__":
    main(*sys.argv[1:])
