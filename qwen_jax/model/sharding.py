"""Where arrays live: a (data, model) mesh over the local devices, and one rule per dimension letter.

Tensor parallelism in the manner of Megatron-LM (Shoeybi et al. 2019): heads and mlp width are split
over `model`, so that each block needs two all-reduces; the batch is split over `data`; the rest is
replicated.
"""

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import ConfigError
from qwen_jax.model.config import Qwen2Config

MESH_AXIS = {"B": "data", "N": "model", "K": "model", "F": "model"}


def make_mesh(model_parallel: int = 1) -> Mesh:
    """All local devices as a [devices / model_parallel, model_parallel] mesh; ConfigError if uneven."""
    devices = jax.local_devices()
    check_division(len(devices), model_parallel, "local devices")
    return Mesh(np.array(devices).reshape(-1, model_parallel), ("data", "model"))


def planned_mesh(devices: int, model_parallel: int) -> AbstractMesh:
    """The mesh of a machine with so many devices; ConfigError if uneven."""
    check_division(devices, model_parallel, "devices planned for (--devices)")
    return AbstractMesh((devices // model_parallel, model_parallel), ("data", "model"))


def check_division(devices: int, model_parallel: int, name: str) -> None:
    """Raises ConfigError where `model_parallel` does not divide the devices, which the message calls `name`."""
    if devices % model_parallel:
        raise ConfigError(
            f"--model_parallel {model_parallel} does not divide the {devices} {name}; choose a divisor"
        )


def check_split(config: Qwen2Config, parts: int) -> None:
    """Raises ConfigError where `--model_parallel parts` cannot split this model's heads and mlp width."""
    heads_fit = config.num_kv_heads % parts == 0 or parts % config.num_kv_heads == 0
    if config.num_heads % parts or config.intermediate_size % parts or not heads_fit:
        raise ConfigError(
            f"--model_parallel {parts} cannot split {config.num_heads} heads, {config.num_kv_heads} kv heads "
            f"and mlp width {config.intermediate_size} evenly; choose a common divisor"
        )


def sharding_of(mesh: Mesh | AbstractMesh, letters: str, dims: dict[str, int]) -> NamedSharding:
    """The sharding of an array whose axes are `letters`; kv heads that are too few are replicated."""

    def axis(letter: str) -> str | None:
        name = MESH_AXIS.get(letter)
        splits = name is not None and dims.get(letter, 0) % mesh.shape[name] == 0
        return name if splits or letter == "B" else None

    return NamedSharding(mesh, P(*map(axis, letters)))
