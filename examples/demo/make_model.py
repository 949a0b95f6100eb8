#!/usr/bin/env python3
"""Writes examples/demo/model: a tiny random Qwen2.5-architecture checkpoint with a small tokenizer.

Its hidden states mean nothing; it exists so that the whole path can be tried in seconds without a hub.
Run from the repository's root: python -m examples.demo.make_model
"""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qwen_jax.data.layouts import PROMPT_FORMATS
from qwen_jax.data.streams import read_stream
from qwen_jax.model.config import parse_config
from qwen_jax.model.weights import expected_shapes

DEMO = Path(__file__).parent
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = 512
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def write_weights(folder: Path) -> None:
    """Random tensors, biases and norms too, in bfloat16."""
    rng = np.random.default_rng(0)
    shapes = expected_shapes(parse_config(CONFIG)) | {"model.norm.weight": (CONFIG["hidden_size"],)}
    tensors = {}
    for name, shape in shapes.items():
        values = rng.normal(0, 1 / np.sqrt(shape[-1]), shape)
        if "norm" in name:
            values = rng.uniform(0.5, 1.5, shape)
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE trained on the demo stream; like Qwen's, every digit is a token of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # ties between merges are then broken the same way each time
    )
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(demo_prompts(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def demo_prompts() -> list[str]:
    """The texts that the tokenizer is trained on: the demo stream's prompts."""
    layout = PROMPT_FORMATS["rows"]
    tasks = (task for _, task in read_stream(DEMO / "streams" / "stream_000.jsonl"))
    return ["".join(segment.text for segment in layout.segments(task)) for task in tasks]


def main(folder: Path = DEMO / "model") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    write_weights(folder)
    write_tokenizer(folder)


if __name__ == "__main__":
    main()
