"""LoRA adapters (Hu et al. 2021) as PEFT stores them: low-rank changes of a checkpoint's matrices, merged in float32.

A matrix [out, in] becomes W + s B A, with A [r, in], B [out, r] and s = alpha / r (alpha / sqrt(r) with rsLoRA).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import ConfigError
from qwen_jax.model.tensors import READABLE_DTYPES, file_sha256, open_tensors

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<matrix>.+)\.lora_(?P<side>[AB])\.weight")
# What would change more than a matrix by a low-rank product, or by another one. `bias` says which biases were trained.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "modules_to_save": ([],),
    "alpha_pattern": ({},),
    "trainable_token_indices": ([],),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the model, too
}


@dataclass(frozen=True)
class LowRank:
    """A change of one matrix, scale included. a: float32 [r, in]; b: float32 [out, r]."""

    a: np.ndarray
    b: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def added(self, stored: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """float32: the part of the matrix that is stored, changed."""
        return stored.astype(np.float32) + self.b[rows] @ self.a[:, columns]


@dataclass(frozen=True)
class Adapter:
    """changes: by the matrix's name in the checkpoint."""

    folder: Path
    changes: Mapping[str, LowRank]

    def digest(self) -> str:
        """Of both files."""
        return "".join(file_sha256(self.folder / name) for name in (CONFIG_NAME, TENSORS_NAME))

    def faults(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What does not fit a checkpoint with these shapes."""
        return [
            f"adapter of {name} is {list(change.shape)}, the model has {list(shapes.get(name, ())) or 'no such matrix'}"
            for name, change in sorted(self.changes.items())
            if shapes.get(name) != change.shape
        ]


def open_adapter(folder: str | Path) -> Adapter:
    """Reads an adapter whole, as it is small; raises ConfigError naming what is missing or not supported."""
    folder = Path(folder)
    config = _read_config(folder / CONFIG_NAME)
    sides: dict[str, dict[str, np.ndarray]] = {}
    with open_tensors(folder / TENSORS_NAME) as tensors:
        faults = []
        for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
            found = _TENSOR.fullmatch(name)
            if found is None or tensors.get_slice(name).get_dtype() not in READABLE_DTYPES:
                faults.append(name)
            else:
                sides.setdefault(f"{found['matrix']}.weight", {})[found["side"]] = tensors.get_tensor(name)
    faults += [f"half of {name}" for name, each in sides.items() if not _is_product(each)]
    if faults or not sides:
        raise ConfigError(f"{folder}: not supported in an adapter: {', '.join(faults) or 'no tensor at all'}")
    return Adapter(folder, {name: _low_rank(each["A"], each["B"], config) for name, each in sides.items()})


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, alpha = config["peft_type"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a LoRA adapter's configuration ({error!r}); --adapter_path takes what PEFT saves"
        ) from error
    if kind != "LORA" or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ConfigError(f"{path}: peft_type {kind!r} with lora_alpha {alpha!r} is not supported, only LORA")
    for key, allowed in _PLAIN.items():
        if config.get(key) is not None and config[key] not in allowed:
            raise ConfigError(f"{path}: {key} {config[key]!r} is not supported; merge the adapter with PEFT")
    return config


def _is_product(sides: Mapping[str, np.ndarray]) -> bool:
    return (
        sides.keys() == {"A", "B"}
        and sides["A"].ndim == sides["B"].ndim == 2
        and len(sides["A"]) == sides["B"].shape[1] > 0
    )


def _low_rank(a: np.ndarray, b: np.ndarray, config: Mapping[str, Any]) -> LowRank:
    rank = len(a)
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(a.astype(np.float32), b.astype(np.float32) * np.float32(scale))
