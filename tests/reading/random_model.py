"""The demo's model as it would be without training: every tensor random, biases and norms too."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qwen_jax.model.config import parse_config
from qwen_jax.model.weights import expected_shapes
from tests.run_worker.starts import ROOT

TRAINED = ROOT / "examples" / "demo" / "model"


def write_random_model(folder: Path) -> Path:
    """In bfloat16, the same bits each time; the tokenizer is the demo's."""
    shutil.copytree(TRAINED, folder)
    config = json.loads((TRAINED / "config.json").read_text()) | {"rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = expected_shapes(parse_config(config)) | {"model.norm.weight": (config["hidden_size"],)}
    tensors = {}
    for name, shape in shapes.items():
        values = rng.normal(0, 1 / np.sqrt(shape[-1]), shape)
        if "norm" in name:
            values = rng.uniform(0.5, 1.5, shape)
        tensors[name] = values.astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
