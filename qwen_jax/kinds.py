"""What can be stored of a model: kinds of activations, what each means, what other tools call it, and its dtypes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Kind:
    """meaning: for metadata.json and cards. hook: TransformerLens' and SAELens' name, {} for the layer. module: where
    Hugging Face's block has it, "" for the block itself, as what that module takes (`taken_in`) or gives. letters: the
    dimensions of a row, by their letters in model/decoder.py."""

    meaning: str
    hook: str
    module: str
    taken_in: bool = False
    letters: str = "D"

    def width(self, dims: Mapping[str, int]) -> int:
        """Values of a row, in a model whose sizes by letter are `dims`."""
        return prod(dims[letter] for letter in self.letters)


KINDS = {
    "residual": Kind(
        "residual stream after block i (0-based), before the final norm; Hugging Face hidden_states[i + 1] for every "
        "block but the last, whose entry there is already normed",
        "blocks.{}.hook_resid_post",
        "",
    ),
    "attn": Kind(
        "output of block i's attention (0-based), before it is added to the residual stream",
        "blocks.{}.hook_attn_out",
        "self_attn",
    ),
    "mlp": Kind(
        "output of block i's MLP (0-based), before it is added to the residual stream",
        "blocks.{}.hook_mlp_out",
        "mlp",
    ),
    "resid_mid": Kind(
        "residual stream between block i's attention and its MLP (0-based)",
        "blocks.{}.hook_resid_mid",
        "post_attention_layernorm",
        taken_in=True,
    ),
    "attn_in": Kind(
        "what block i's attention takes in (0-based): the residual stream before the block, normed, times the norm's "
        "weight, which TransformerLens leaves out where it does not fold it",
        "blocks.{}.ln1.hook_normalized",
        "input_layernorm",
    ),
    "mlp_in": Kind(
        "what block i's MLP takes in (0-based): resid_mid, normed, times the norm's weight, which TransformerLens "
        "leaves out where it does not fold it",
        "blocks.{}.ln2.hook_normalized",
        "post_attention_layernorm",
    ),
    "attn_heads": Kind(
        "output of each of block i's attention heads (0-based), one behind the other, before the output projection",
        "blocks.{}.attn.hook_z",
        "self_attn.o_proj",
        taken_in=True,
        letters="NH",
    ),
    "mlp_act": Kind(
        "neurons of block i's MLP (0-based): silu(gate) times up, before the down projection",
        "blocks.{}.mlp.hook_post",
        "mlp.down_proj",
        taken_in=True,
        letters="F",
    ),
}
"""Of a layer, by the names of --activation_type."""
EMBEDDING = "embedding"
"""What comes besides, once for all layers; the key of its records."""
ALL_KINDS = KINDS | {
    EMBEDDING: Kind(
        "embedding output: the residual stream before block 0; Hugging Face hidden_states[0]",
        "hook_embed",
        "embed_tokens",
    )
}
LINE_NOTES: dict[str, type] = {"test_index": int, "augmentation": str, "piece": str}
"""What a stream line may say of a sample besides: which of its task's tests it asks for, from 0; what was done to the
task (data/augment.py) and which part of a text it is (data/spread.py), as JSON."""
NOTES = LINE_NOTES | {"solved": int}
"""What a record may: the same, and whether the model's own answer is the test's output (1 or 0)."""


EXACT_CHANNELS = 4
"""Values of a quantised row that are stored as they were computed, those of the largest size: massive activations stand
in very few channels (Sun et al. 2024), and each takes 6 to 8 bytes a row."""
QUANTISED_KEYS = ("scale", "exact_channels", "exact_values")
"""What a record holds beside the codes of quantised rows."""


@dataclass(frozen=True)
class StoredDtype:
    """A dtype of --activation_dtype.

    bytes: of a value. compressed: bytes of a raw byte, measured on the demo model's residual stream (docs/reading.md).
    eps: from 1 to the next value, 0 where values lie evenly. largest: of the codes, where a row is codes times a scale;
    0 where it is values.
    """

    bytes: int
    compressed: float
    eps: float
    largest: int = 0

    @property
    def is_quantised(self) -> bool:
        return self.largest > 0

    def rounding(self, width: int) -> float:
        """The relative error that storing a row of so many values may bring, by Euclidean norms. Evenly spaced codes:
        half a step for each value, in a row that holds its exact values, and one more, of the size of the largest
        code."""
        return self.eps or (width / (EXACT_CHANNELS + 1)) ** 0.5 / (2 * self.largest)

    def row_bytes(self, width: int, compute_dtype: str) -> int:
        """Raw bytes of a row: of a quantised one its codes, a float32, and for each exact value an int32 and itself."""
        beside = 4 + EXACT_CHANNELS * (4 + STORED_DTYPES[compute_dtype].bytes) if self.is_quantised else 0
        return width * self.bytes + beside


STORED_DTYPES = {
    "float32": StoredDtype(4, 0.92, 2**-23),
    "bfloat16": StoredDtype(2, 0.78, 2**-7),
    "float16": StoredDtype(2, 0.92, 2**-10),
    "int8": StoredDtype(1, 0.9, 0, largest=127),
    "float8_e4m3fn": StoredDtype(1, 0.81, 2**-3, largest=448),
}
COMPUTE_DTYPES = ("float32", "bfloat16")

KEEP_ALL = "all"
"""The --keep_tokens that leaves no token out."""
