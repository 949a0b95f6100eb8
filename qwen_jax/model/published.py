"""The sizes that models are published in, as their config.json says."""

from typing import Any

# Qwen/Qwen2.5-*: hidden, mlp, layers, heads, kv heads, vocabulary, tied.
PUBLISHED = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3["original_max_position_embeddings"] = 8192
_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 40960}
_LLAMA = {"model_type": "llama", "rope_theta": 5e5, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
_LLAMA_3_1 = _LLAMA | {"rope_scaling": _LLAMA3 | {"factor": 8.0}}
_LLAMA_3_2 = _LLAMA | {"rope_scaling": _LLAMA3 | {"factor": 32.0}}
_MISTRAL = {
    "model_type": "mistral",
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
# The same sizes, and the rest.
OTHER_FAMILIES = {
    "Qwen3-0.6B": ((1024, 3072, 28, 16, 8, 151936, True), _QWEN3),
    "Qwen3-1.7B": ((2048, 6144, 28, 16, 8, 151936, True), _QWEN3),
    "Qwen3-4B": ((2560, 9728, 36, 32, 8, 151936, True), _QWEN3),
    "Qwen3-8B": ((4096, 12288, 36, 32, 8, 151936, False), _QWEN3),
    "Qwen3-14B": ((5120, 17408, 40, 40, 8, 151936, False), _QWEN3),
    "Qwen3-32B": ((5120, 25600, 64, 64, 8, 151936, False), _QWEN3),
    "Llama-3.2-1B": ((2048, 8192, 16, 32, 8, 128256, True), _LLAMA_3_2 | {"head_dim": 64}),
    "Llama-3.2-3B": ((3072, 8192, 28, 24, 8, 128256, True), _LLAMA_3_2 | {"head_dim": 128}),
    "Llama-3.1-8B": ((4096, 14336, 32, 32, 8, 128256, False), _LLAMA_3_1),
    "Llama-3.1-70B": ((8192, 28672, 80, 64, 8, 128256, False), _LLAMA_3_1),
    "Mistral-7B-v0.3": ((4096, 14336, 32, 32, 8, 32768, False), _MISTRAL),
}


def config_fields(size: str) -> dict[str, Any]:
    """What the `config.json` of that size says. size: of PUBLISHED or OTHER_FAMILIES."""
    qwen = {"model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 32768}
    sizes, rest = OTHER_FAMILIES[size] if size in OTHER_FAMILIES else (PUBLISHED[size], qwen)
    hidden, mlp, layers, heads, kv_heads, vocab, tied = sizes
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        **rest,
    }
