"""Files of tensors: safetensors, opened with NumPy, and their digests."""

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, so that safetensors can return it)
from safetensors import SafetensorError, safe_open

from qwen_jax.errors import ConfigError

READABLE_DTYPES = ("BF16", "F16", "F32")


def open_tensors(file: Path) -> Any:
    """A safetensors file by name and slice; raises ConfigError where it is none."""
    try:
        return safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors ({error}); download it again") from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
