"""What can be stored of a model: kinds of activations, what each means, what other tools call it, and its dtypes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """meaning: for metadata.json and cards. hook: TransformerLens' and SAELens' name, {} for the layer."""

    meaning: str
    hook: str


KINDS = {
    "residual": Kind(
        "residual stream after block i (0-based), before the final norm; Hugging Face hidden_states[i + 1] for every "
        "block but the last, whose entry there is already normed",
        "blocks.{}.hook_resid_post",
    ),
    "attn": Kind(
        "output of block i's attention (0-based), before it is added to the residual stream",
        "blocks.{}.hook_attn_out",
    ),
    "mlp": Kind(
        "output of block i's MLP (0-based), before it is added to the residual stream",
        "blocks.{}.hook_mlp_out",
    ),
}
"""Of a layer, by the names of --activation_type."""
EMBEDDING = "embedding"
"""What comes besides, once for all layers; the key of its records."""
ALL_KINDS = KINDS | {
    EMBEDDING: Kind(
        "embedding output: the residual stream before block 0; Hugging Face hidden_states[0]", "hook_embed"
    )
}
STORED_DTYPES = ("float32", "bfloat16", "float16")
COMPUTE_DTYPES = STORED_DTYPES[:2]

KEEP_ALL = "all"
"""The --keep_tokens that leaves no token out."""
