"""The dataset card of an export: a README.md with the header that the Hugging Face Hub reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.kinds import STORED_DTYPES
from qwen_jax.reading.runs import DescribedRun, Run

_SNIPPETS = {
    "safetensors": """from safetensors import safe_open
import ml_dtypes  # for bfloat16

with safe_open("{folder}/{part}.safetensors", framework="numpy") as file:
    rows = file.get_tensor("activations")  # [rows, hidden]
    token_ids = file.get_tensor("token_ids")  # [rows]
""",
    "npy": """import numpy as np

rows = np.load("{folder}.npy", mmap_mode="r")  # [rows, hidden]
token_ids = np.load("token_ids.npy", mmap_mode="r")  # [rows]
""",
    "hf_dataset": """from datasets import load_from_disk

data = load_from_disk("{folder}").with_format("numpy")
rows = data[0]["{hook}"]  # [{context_size}, hidden]
""",
}


def write_card(
    output: Path,
    to: str,
    runs: Sequence[Run],
    layers: Sequence[int | str],
    *,
    rows: int,
    meanings: Sequence[str],
    snippet: Mapping[str, Any],
) -> None:
    """Writes README.md: model, layers, what a row means, counts, how to load it.

    rows: of each layer, as written. meanings: lines that say what a row of a layer is. snippet: what the snippet of
    the format `to` names.
    """
    lines = [*_header(runs), "", "# Hidden states", "", *_facts(runs, layers, rows, meanings)]
    code = _SNIPPETS[to].format(**snippet)
    (output / "README.md").write_text("\n".join([*lines, "", "```python", code + "```", ""]))


def _header(runs: Sequence[Run]) -> list[str]:
    name = _model(runs)["name"]
    base = [f"base_model: {name}"] if name.count("/") == 1 and not name.startswith((".", "/", "~")) else []
    return ["---", *base, "tags:", "- activations", "- sparse-autoencoder", "---"]


def _model(runs: Sequence[Run]) -> dict[str, Any]:
    return (runs[0].metadata or {}).get("model", {"name": "unknown", "revision": ""})


_RESTORED = " with a scale a token, here as float32"


def _facts(runs: Sequence[Run], layers: Sequence[int | str], rows: int, meanings: Sequence[str]) -> list[str]:
    model = _model(runs)
    facts = [
        f"- model: {model['name']}{', revision ' + model['revision'] if model['revision'] else ''}",
        f"- layers: {', '.join(map(str, layers))}",
        *(f"- {meaning}" for meaning in meanings),
        f"- rows of each layer: {rows:,}, one a kept token",
    ]
    described = [run for run in runs if isinstance(run, DescribedRun)]
    if described:
        first = described[0].metadata
        samples = sum(run.entries[name]["samples"] for run in described for name in run.shards)
        facts += [
            f"- samples: {samples:,} from workers {', '.join(str(run.worker_id) for run in described)}",
            f"- kept tokens: {first['fingerprint']['keep_tokens']}; prompts of at most "
            f"{first['fingerprint']['max_seq_length']} tokens",
            f"- computed in {first['compute_dtype']}, stored in {first['activation_dtype']}"
            f"{_RESTORED if STORED_DTYPES[first['activation_dtype']].is_quantised else ''}",
            f"- weights digest: {first['model']['weights_digest']}",
        ]
    return facts
