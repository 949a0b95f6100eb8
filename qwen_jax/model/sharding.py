"""Where arrays live: a (data, model) mesh over the local devices, and one rule per dimension letter.

Tensor parallelism in the manner of Megatron-LM (Shoeybi et al. 2019): heads and mlp width are split
over `model`, so that each block needs two all-reduces; each device along `data` has a row of samples of its own;
the rest is replicated.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.errors import ConfigError
from qwen_jax.model.config import ModelConfig

MESH_AXIS = {"X": "data", "N": "model", "K": "model", "F": "model"}


def is_split(letters: str) -> bool:
    """Whether devices that share the weights have parts of an array with these axes."""
    return any(MESH_AXIS.get(letter) == "model" for letter in letters)


@dataclass(frozen=True)
class Parts:
    """How a layer is shared: by `count` devices along the mesh axis `axis`, each with its own heads and mlp width."""

    axis: str | None = None
    count: int = 1

    def add(self, x: jax.Array) -> jax.Array:
        """The sum of what all parts computed."""
        return x if self.count == 1 else jax.lax.psum(x, self.axis)

    def whole(self, x_TN: jax.Array) -> jax.Array:
        """What all parts hold of an array whose last axis is split over them."""
        return (
            x_TN if self.count == 1 else jax.lax.all_gather(x_TN, self.axis, axis=x_TN.ndim - 1, tiled=True)
        )

    def apart(self, x: Any) -> Any:
        """The same arrays, kept out of any fusion with `add`: TPU7x's compiler crashes where such a one writes to
        captured rows, which are tiled in another way."""
        return x if self.count == 1 else jax.lax.optimization_barrier(x)

    def kv_heads_each(self, kv_heads: int) -> int:
        """kv heads that each part holds keys for; where there are fewer than parts, several hold the same one."""
        return max(1, kv_heads // self.count)

    def own_kv_heads(self, x_K: jax.Array, kv_heads: int) -> jax.Array:
        """The kv heads that this part's query heads look at, of an array that begins with kv heads.

        Those that are too few to be split lie on every device (sharding_of).
        """
        if kv_heads % self.count == 0:
            return x_K
        first = jax.lax.axis_index(self.axis) * kv_heads // self.count
        return jax.lax.dynamic_slice_in_dim(x_K, first, 1)


WHOLE = Parts()


def make_mesh(model_parallel: int = 1) -> Mesh:
    """All local devices as a [devices / model_parallel, model_parallel] mesh; ConfigError if uneven."""
    devices = jax.local_devices()
    check_division(len(devices), model_parallel, "local devices")
    return Mesh(np.array(devices).reshape(-1, model_parallel), ("data", "model"))


def planned_mesh(
    devices: int, model_parallel: int, name: str = "devices planned for (--devices)"
) -> AbstractMesh:
    """The mesh of a machine with so many devices; ConfigError if uneven, which calls them `name`."""
    check_division(devices, model_parallel, name)
    return AbstractMesh((devices // model_parallel, model_parallel), ("data", "model"))


def check_division(devices: int, model_parallel: int, name: str) -> None:
    """Raises ConfigError where `model_parallel` does not divide the devices, which the message calls `name`."""
    if devices % model_parallel:
        raise ConfigError(
            f"--model_parallel {model_parallel} does not divide the {devices} {name}; choose a divisor"
        )


def check_split(config: ModelConfig, parts: int) -> None:
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
        return name if splits or letter == "X" else None

    return NamedSharding(mesh, P(*map(axis, letters)))
