"""The sizes that Qwen2.5 is published in."""

from typing import Any

# Published sizes (config.json of Qwen/Qwen2.5-*): hidden, mlp, layers, heads, kv heads, vocabulary, tied.
PUBLISHED = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}


def config_fields(size: str) -> dict[str, Any]:
    """What the `config.json` of that size says."""
    hidden, mlp, layers, heads, kv_heads, vocab, tied = PUBLISHED[size]
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    }
