"""A program compiled for a machine that is not there, and what its compiler says of it: libtpu compiles without a TPU.

What is compiled has run nowhere. One process at a time: libtpu holds a lock.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from jax.stages import Lowered

from qwen_jax.accelerators import Accelerator
from qwen_jax.errors import ConfigError
from qwen_jax.model.sharding import check_division


@dataclass(frozen=True)
class Compiled:
    """Bytes on each device, as the compiler lays them out.

    arguments: what is there before. outputs: what is given, without what takes an argument's place. temporaries:
    besides, while it runs. code: the program itself.
    """

    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    code: int
    text: str


def absent_mesh(machine: Accelerator, model_parallel: int) -> Mesh:
    """The (data, model) mesh of a machine that is not there; ConfigError where nothing here can compile for it."""
    if machine.topology is None:
        raise ConfigError(f"nothing compiles for {machine.name} where there is none; leave --compile out")
    # libtpu asks the metadata server of a TPU VM otherwise, and waits for it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    options = {} if machine.chip_config is None else {"chip_config_name": machine.chip_config}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=machine.topology, **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = (str(error).splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"nothing compiles for {machine.name} here: {said}; pip install 'jax[tpu]'"
        ) from error
    check_division(len(found.devices), model_parallel, f"devices of {machine.name}")
    return Mesh(np.array(found.devices).reshape(-1, model_parallel), ("data", "model"))


def compile_now(lowered: Lowered) -> Compiled:
    """Raises JaxRuntimeError where the compiler refuses, for instance for lack of memory on the device."""
    started = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - started
    used: Any = compiled.memory_analysis()  # None only where a compiler says nothing; TPU's does
    return Compiled(
        seconds,
        used.argument_size_in_bytes,
        used.output_size_in_bytes - used.alias_size_in_bytes,
        used.temp_size_in_bytes,
        used.generated_code_size_in_bytes,
        compiled.as_text() or "",
    )
